"""`retnet-export bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from retnet_export.commands.options import BackendName, BundlePath, Json, LowMemory, Threads, numbers
from retnet_export.commands.output import print_columns, print_json, progress


def bench(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="N,N", help="Prompt lengths to measure: pp512.")] = "512",
    new: Annotated[str, typer.Option("-n", "--new", metavar="N,N", help="Numbers of tokens to decode: tg128.")] = "128",
    batches: Annotated[str, typer.Option("-b", "--batches", metavar="N,N", help="Sequences that decode together.")] = "1",
    depths: Annotated[str, typer.Option("-d", "--depths", metavar="N,N", help="Tokens read before the measurement.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Repetitions of each test.")] = 5,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
    form: Annotated[Literal["table", "md", "csv"], typer.Option("--format", help="How results are printed.")] = "table",
    as_json: Json = False,
) -> None:
    """Measure prompt and decode speed in tokens/s, mean ± deviation, with the tests of llama-bench."""
    from retnet_export.compare.bench import HEAD, cells, comma_separated, line, markdown, run, trials_of
    from retnet_export.compare.machine import cores, description, versions
    from retnet_export.plan.sizes import sizes_of_bundle
    from retnet_export.runtime.model import load

    trials = trials_of(*(numbers(*pair) for pair in (("prompt", prompt), ("new", new), ("batches", batches), ("depths", depths))))
    model = load(bundle, backend, threads=threads, low_memory=low_memory)
    sizes = sizes_of_bundle(model.bundle.manifest)
    with progress("bench", quiet=as_json) as update:
        speeds = list(run(model, trials, repetitions, update))
    lines = [line(model, sizes.parameters, threads, speed) for speed in speeds]
    if as_json:
        machine = description(cores(threads)) | {"cores": str(len(cores(None)))}
        results = [
            asdict(each) | {"samples": list(speed.tokens_per_second.values)} for each, speed in zip(lines, speeds, strict=True)
        ]
        step = {
            "layers": sizes.config.num_layers,
            "matrix_bytes": round(sizes.matrix_bytes + sizes.vector_bytes),
            "state_bytes": sizes.state_bytes,
        }
        print_json({"bundle": str(bundle), "model": step, "machine": machine, "versions": versions(), "results": results})
    elif form == "table":
        print_columns("", HEAD, [cells(each) for each in lines])
    else:
        typer.echo(markdown(lines) if form == "md" else comma_separated(lines))
