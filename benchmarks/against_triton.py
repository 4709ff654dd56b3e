"""The same bundle behind `retnet-export serve` and behind Triton Inference Server, taking turns.

    python benchmarks/against_triton.py BUNDLE [--clients 1,8,32] [--seconds 8] [--rounds 4] [--threads 1]

Both are HTTP with streamed answers and have the same client, slots, threads, cache setting, Python and NumPy: the ones of
RETNET_TRITON_PYTHON (tests/triton_server.py says what that is, and where Triton's binary comes from).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from clients import Server
from common import ROOT, describe_machine
from servers import serving, vocabulary_of
from turns import clients_table, take_turns

from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.serve.triton import TritonOptions, write_repository

sys.path.append(str(ROOT / "tests"))


def write_model(bundle: Path, folder: Path, slots: int, threads: int) -> str:
    """A model repository of the bundle, and the name of its model: without a cache, and with this package beside it."""
    opened = open_bundle(bundle)
    name = opened.manifest.name
    write_repository(opened, folder, TritonOptions(max_batch=slots))
    config = folder / name / "config.pbtxt"
    text = config.read_text().replace('"cache_mb" value { string_value: "512" }', '"cache_mb" value { string_value: "0" }')
    config.write_text(text + f'parameters [ {{ key: "threads" value {{ string_value: "{threads}" }} }} ]\n')
    (folder / name / "1" / "retnet_export").symlink_to(ROOT)
    return name


def versions(python: Path) -> str:
    """Of what both servers run with."""
    code = "import numpy, onnxruntime; print(f'onnxruntime {onnxruntime.__version__}, numpy {numpy.__version__}')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(
    bundle: Annotated[Path, typer.Argument(help="what is served")],
    clients: Annotated[str, typer.Option(help="separated by commas")] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="for which each load is watched, once the clients are out of step")] = 8.0,
    rounds: Annotated[int, typer.Option(help="of turns: ABBA…")] = 4,
    threads: Annotated[int, typer.Option(help="of products, in both")] = 1,
) -> None:
    """Measure both servers."""
    import triton_server

    if (reason := triton_server.missing()) is not None:
        raise SystemExit(reason)
    counts = [int(count) for count in clients.split(",")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    os.environ.update(environment)  # Triton takes it from here
    python = Path(os.environ.get("RETNET_TRITON_PYTHON", sys.prefix)) / "bin" / "python"
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = write_model(bundle, scratch / "models", max(counts), threads)
        (scratch / "package").mkdir()
        (scratch / "package" / "retnet_export").symlink_to(ROOT)
        environment["PYTHONPATH"] = str(scratch / "package")  # the other environment need not have this package
        triton = stack.enter_context(triton_server.triton(scratch / "models", scratch, name))
        arguments = ["--max-batch", max(counts), "--cache-mb", 0, "--threads", threads]
        servers = {
            "retnet-export serve": stack.enter_context(serving(bundle, *arguments, python=str(python), environment=environment)),
            "Triton": Server("triton", triton.http, vocabulary_of(bundle), 0, name),
        }
        about = [f"servers: {versions(python)}", bundle.name, f"{threads} threads", f"{rounds} rounds"]
        print(describe_machine(), *about, f"load {os.getloadavg()[0]:.1f}", sep="; ")
        clients_table(take_turns(servers, counts, rounds, seconds), counts)


if __name__ == "__main__":
    typer.run(main)
