"""`retnet-export compare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retnet_export.commands.options import BackendName, BundlePath, Json, Threads, numbers
from retnet_export.commands.output import print_columns, print_json, print_table, progress
from retnet_export.runtime.errors import ArgumentError
from retnet_export.runtime.progress import Progress

if TYPE_CHECKING:
    from retnet_export.compare.results import Comparison


def compare(
    bundle: BundlePath,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="REPORT", help="The folder for the report; default: BUNDLE.comparison.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens read before decoding is timed.")] = "0,512,2048,8192,32768",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts to read.")] = "512,2048",
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,2,4,8",
    batch_context: Annotated[int, typer.Option(help="Tokens of context in the batches.")] = 2048,
    kv_heads: Annotated[
        int | None, typer.Option(help="The Transformer's key and value heads; default: as many as its query heads.")
    ] = None,
    cache: Annotated[
        Literal["compute", "int8"], typer.Option(help="Format of the Transformer's cache; compute: the format of the products.")
    ] = "compute",
    memory_budget: Annotated[
        float | None, typer.Option(help="Gigabytes that each model may use; default: the free memory.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also run another engine: onnxruntime-genai or llama.cpp; may be repeated."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report the bundle's perplexity on this text, which it was not trained on.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Approximate time for each engine in each cell.")] = 2.0,
    backend: BackendName = "auto",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the bundle against a KV-cache Transformer of the same size: memory, latency, throughput."""
    from retnet_export.compare.comparison import CompareOptions
    from retnet_export.compare.comparison import compare as run
    from retnet_export.compare.plots import require_matplotlib
    from retnet_export.compare.report import JSON_NAME, document, write_report
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.files import new_folder

    require_matplotlib()
    if memory_budget is not None and not 0 < memory_budget < 1e6:
        raise ArgumentError("memory_budget", f"is {memory_budget:g}, expected gigabytes, more than 0")
    options = CompareOptions(
        contexts=numbers("contexts", contexts),
        prompts=numbers("prompts", prompts),
        batches=numbers("batches", batches),
        batch_context=batch_context,
        kv_heads=kv_heads,
        cache=cache,
        memory_budget=None if memory_budget is None else round(memory_budget * 1e9),
        seconds=seconds,
        threads=threads,
        backend=backend,
        peers=tuple(peer or ()),
    )
    opened = open_bundle(bundle)
    target = output or Path(f"{opened.manifest.name}.comparison")
    # The folder is made first: that it cannot be written must not come out after minutes of measuring.
    with new_folder(target, marker=JSON_NAME, force=force) as folder:
        with progress("compare", quiet=as_json) as update:
            perplexity = None if text is None else _perplexity(opened.path, text, backend, threads, update)
            comparison = run(opened, options, progress=update)
        if text is not None:
            comparison = replace(comparison, perplexity=perplexity, text=text.name)
        write_report(comparison, folder)
    if as_json:
        print_json(document(comparison))
    else:
        print_comparison(comparison, target)


def _perplexity(bundle: Path, text: Path, backend: str, threads: int | None, update: Progress) -> float:
    from retnet_export.quantize.evaluation import evaluate
    from retnet_export.runtime.model import load

    return evaluate(load(bundle, backend, threads=threads, check_hashes=False), text, progress=update).perplexity


def print_comparison(comparison: Comparison, target: Path) -> None:
    from retnet_export.compare.analysis import caveats, summary
    from retnet_export.compare.report import batch_table, facts, latency_table, model_table, prefill_table

    tables = {
        "what is compared": model_table(comparison),
        "decoding, one sequence": latency_table(comparison),
        "decoding, several sequences": batch_table(comparison),
        "reading a prompt": prefill_table(comparison),
    }
    for title, table in tables.items():
        if table[1]:
            print_columns(title, *table)
    for line in sorted({f"{m.engine}, {m.cell.name}: {m.note}" for m in comparison.measurements if m.note and m.timing is None}):
        typer.echo(f"\n{line}")
    print_table("\nmeasured on", facts(comparison))
    typer.echo("\n" + "\n".join(summary(comparison)))
    typer.echo("\n" + "\n".join(caveats(comparison)) + f"\n\nreport: {target / 'report.html'}")
