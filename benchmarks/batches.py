"""Batches and prompts of the backend `cuda` on random weights, against the memory bus.

    python benchmarks/batches.py                     the tables of docs/lab/gpu-batches.md; two minutes on an H100, no files

A token of a batch is: tokens in, one step, the tokens of the largest logits out. The floor of a step is the time to read every
weight and every state once and to write one state in `WINDOW`; the other floor writes all states.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import MODELS
from step import FORMATS, copy_bandwidth, random_model

from retnet_export.runtime.backends.cuda import backend as cuda_backend
from retnet_export.runtime.backends.cuda import compiler
from retnet_export.runtime.backends.cuda.many_source import WINDOW
from retnet_export.runtime.backends.cuda.runner import CudaRunner
from retnet_export.runtime.device import cuda


def times_of_steps(runner: CudaRunner, steps: int) -> list[float]:
    """Milliseconds of each step of a greedy loop."""
    tokens, times = np.zeros(runner.batch, np.int64), []
    for _ in range(steps + WINDOW):
        began = time.perf_counter()
        runner.step(tokens)
        tokens = runner.top(1)[0][:, 0]
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[WINDOW:])


def times_of_prompts(runner: CudaRunner, tokens: int, chunk: int, repeats: int = 7) -> list[float]:
    """Milliseconds of reading a prompt, as a session does."""
    prompt, times = np.random.default_rng(0).integers(0, 30_000, (1, tokens)), []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        for start in range(0, tokens, chunk):
            piece = prompt[:, start : start + chunk]
            runner.prefill(piece, np.array([piece.shape[1]]))
        runner.top(1)
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[2:])


def measure(name: str, fmt: str, batches: list[int], prompts: list[int], bandwidth: float, steps: int) -> None:
    bundle, random = random_model(MODELS[name], *FORMATS[fmt])
    backend = cuda_backend.CudaBackend(bundle, weights=random)
    config, sources = random.config, random.sources
    read = config.num_layers * sum(each.layout.bytes for each in sources.layers[0].values()) + sources.head.layout.bytes
    state = 4 * config.state_elements
    for batch in batches:
        try:
            times = times_of_steps(backend.open_runner(batch), steps)
        except cuda.CudaMemoryError as error:
            print(f"| {name} | {fmt} | {batch} | {error} |")
            continue
        ms = statistics.median(times)
        floors = [
            1e3 * (read + batch * state * passes) / 1e9 / bandwidth for passes in ((1 + 1 / WINDOW, 2) if batch > 1 else (2, 2))
        ]
        print(
            f"| {name} | {fmt} | {batch} | {ms:.3f} [{times[len(times) // 10]:.3f}, {times[-1 - len(times) // 10]:.3f}] | "
            f"{1e3 * batch / ms:,.0f} | {floors[0]:.2f} | {100 * floors[0] / ms:.0f} % | {floors[1]:.2f} |",
            flush=True,
        )
        gc.collect()
    runner = backend.open_runner(1)
    for tokens in prompts:
        times = times_of_prompts(runner, tokens, backend.chunk_tokens)
        ms = statistics.median(times)
        print(
            f"| {name} | {fmt} | prompt {tokens} | {ms:.3f} [{times[0]:.3f}, {times[-1]:.3f}] | {1e3 * tokens / ms:,.0f} |",
            flush=True,
        )
    del runner, backend, random
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.5B,7.8B")
    parser.add_argument("--formats", default="fp16,int8,int4")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--prompts", default="1,2,16,128,512,2048")
    parser.add_argument("--steps", type=int, default=56)
    options = parser.parse_args()
    if reason := cuda_backend.unavailable():
        raise SystemExit(reason)
    bandwidth = copy_bandwidth()
    device, (driver, _) = cuda.device(), cuda.versions()
    compiled = f"driver {driver}, NVRTC {compiler.compiler_version()}"
    print(f"{device.name}, {compiled}, copy {bandwidth:,.0f} GB/s, medians of {options.steps} steps")
    print("| model | weights | batch | ms a step | tokens/s | floor, ms | share | floor that writes all states |")
    for name in options.models.split(","):
        for fmt in options.formats.split(","):
            batches, prompts = ([int(each) for each in given.split(",") if each] for given in (options.batches, options.prompts))
            measure(name, fmt, batches, prompts, bandwidth, options.steps)


if __name__ == "__main__":
    main()
