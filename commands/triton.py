"""`retnet-export triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from retnet_export.commands.options import BundlePath


def triton(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The repository to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the bundle's.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies of each model (on each GPU).")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that generate together in an instance.")] = 8,
    gpu: Annotated[list[int] | None, typer.Option(min=0, help="A GPU to run on; may be repeated; default: the CPU.")] = None,
    step: Annotated[Literal["onnxruntime", "tensorrt"], typer.Option(help="What runs the single step.")] = "onnxruntime",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing repository.")] = False,
) -> None:
    """Write a model repository for Triton Inference Server: a model that streams text, and single steps."""
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.serve.triton import TritonOptions, write_repository

    options = TritonOptions(name, instances, max_batch, tuple(gpu or ()), step)
    write_repository(open_bundle(bundle), output, options, force=force)
    typer.echo(f"{output}: a model repository; {output / 'README.md'} says how to run it")
