"""The comparison of docs/lab/comparison.md: a random RetNet of 148M parameters against its Transformer, in one number format.

    python benchmarks/compare.py fp32|int8|int4 [--peer onnxruntime-genai] [--peer llama.cpp]
    python benchmarks/compare.py fp32|int8|int4 --redraw    # page and figures again from report.json

Writes report.json, report.html and the figures to docs/lab/comparison/FORMAT. Speed does not depend on what the weights are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from common import ROOT, random_bundle

from retnet_export.commands.compare import print_comparison
from retnet_export.compare.comparison import CompareOptions, compare
from retnet_export.compare.report import JSON_NAME, write_report
from retnet_export.compare.results import Comparison
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.schema import decode


def bundle_in(form: str, size: str, folder: Path) -> Bundle:
    """A random bundle in a number format."""
    bundle: Bundle = random_bundle(size)
    if form == "fp32":
        return bundle
    return quantize_bundle(bundle, folder / f"{size}-{form}.retnet", QuantizeOptions(weights=form))


def show(stage: str, share: float) -> None:
    """Progress for a log."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {stage} {100 * share:.0f} %", err=True)


def main(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="fp32, int8 or int4")],
    size: Annotated[str, typer.Option(help="the random model")] = "148M",
    seconds: Annotated[float, typer.Option(help="for each engine in each cell")] = 1.0,
    peer: Annotated[list[str] | None, typer.Option(help="outside engines to run, too")] = None,
    cache: Annotated[str, typer.Option(help="the Transformer's cache: compute or int8")] = "compute",
    output: Annotated[Path | None, typer.Option("-o", help="docs/lab/comparison/FORMAT if not given")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="measure nothing: draw the figures of report.json again")] = False,
) -> None:
    """Measure, print, and write the report."""
    target = output or ROOT / "docs" / "lab" / "comparison" / form
    if redraw:
        write_report(decode(Comparison, json.loads((target / JSON_NAME).read_bytes()), JSON_NAME), target)
        return
    with tempfile.TemporaryDirectory() as folder:
        options = CompareOptions(seconds=seconds, peers=tuple(peer or ()), cache=cache)
        comparison = compare(bundle_in(form, size, Path(folder)), options, progress=show)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write_report(comparison, target)
    print_comparison(comparison, target)


if __name__ == "__main__":
    typer.run(main)
