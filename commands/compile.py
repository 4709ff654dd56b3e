"""`retnet-export compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from retnet_export.commands.common import BundlePath, Json, print_json, print_table, progress, size

if TYPE_CHECKING:
    from retnet_export.runtime.bundle.bundle import Bundle
    from retnet_export.runtime.bundle.engines import EngineRecord


def compile_(
    bundle: BundlePath,
    target: Annotated[
        str, typer.Option(help="tensorrt, for the GPU of this machine, or tensorrt-rtx, for RTX GPUs, present or not.")
    ] = "tensorrt",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="A GPU to build for, as 8.6 (tensorrt-rtx only); may be repeated.", show_default=False),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="The most sequences that step together.")] = 1,
    candidates: Annotated[int, typer.Option(min=0, help="How many of the largest logits a step picks on the GPU.")] = 64,
    workspace: Annotated[
        int | None, typer.Option(min=1, metavar="MB", help="Scratch memory for building; TensorRT's choice if not given.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what kernels cost here; the next build is quicker.", show_default=False),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="Decode and prefill as an engine each: a leaner step, and the weights twice.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines of a bundle, decode and prefill; they go into its folder engines/."""
    from retnet_export.export.tensorrt import CompileOptions, compile_bundle
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.schema import encode

    options = CompileOptions(
        target=cast(Literal["tensorrt", "tensorrt-rtx"], target),
        compute_capabilities=tuple(compute_capability or ()),
        max_batch=max_batch,
        candidates=candidates,
        workspace_mb=workspace,
        timing_cache=timing_cache,
        separate=separate,
    )
    opened = open_bundle(bundle)
    with progress("compile", quiet=as_json) as update:
        record = compile_bundle(opened, options, progress=update)
    if as_json:
        print_json(encode(record))
    else:
        print_record(opened, record)


def print_record(bundle: Bundle, record: EngineRecord) -> None:
    rows = [("target", f"{record.target} {record.version}, compute capability {', '.join(record.compute_capabilities)}")]
    rows += [(name, size(file.bytes)) for name, file in record.files.items()]
    rows.append(("weights", f"{size(record.weights_bytes)} on the device"))
    rows += [
        (part.role, f"from {part.graph}.onnx, up to {part.max_tokens} tokens a run, {size(part.activation_bytes)} while it runs")
        for part in record.parts
    ]
    rows.append(("batch", f"up to {record.max_batch}; the {record.candidates} largest logits of each are picked on the device"))
    rows.append(("built in", f"{record.build_seconds:.1f} s"))
    print_table(f"{bundle.path}: compiled", rows)
