"""`retnet-export convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from retnet_export.commands.common import BundlePath, Force, Json, Output, print_json, progress


def convert(
    bundle: BundlePath,
    output: Output,
    dialect: Annotated[
        str, typer.Option(help="Of the graphs: onnxruntime-cpu or onnxruntime-cuda; faster there and nowhere else.")
    ] = "onnxruntime-cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rewrite a portable bundle, quantized or not, with the operators of one runtime."""
    from retnet_export.commands.export import print_summary, summary
    from retnet_export.export.convert import convert_bundle
    from retnet_export.runtime.bundle.bundle import open_bundle

    with progress("convert", quiet=as_json) as update:
        made = convert_bundle(open_bundle(bundle), output, dialect, force=force, progress=update)  # type: ignore[arg-type]  # checked there
    if as_json:
        print_json(summary(made))
    else:
        print_summary(f"{made.path}: {bundle} in the {made.manifest.dialect} dialect", made)
