"""Prefill on the CPU: tokens per second by chunk size, against stepping and against the floor; and what both graphs cost in memory.

    python benchmarks/prefill.py [--size 148M] [--prompt 512] [--threads 2]

1. How fast is a prompt read, at which chunk size, and how much faster than token by token?
2. What is the floor? Every multiplication of the graph at the rate of a large product of matrices on this machine, or every
   weight read once a chunk at its read bandwidth, whichever takes longer.
3. What is resident once a prompt was read and tokens were generated, for each way of holding the weights (`--low-memory`,
   neither, `--no-low-memory`), each in a separate process; and what does each way cost in speed?
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import describe_machine, parameters, random_bundle, read_bandwidth

from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.model import load
from retnet_export.runtime.timing import Sample, timed_ms

CHUNKS = (16, 32, 64, 128, 256, 512)
STEPS = 64
MODES = {"--low-memory": True, "(neither)": None, "--no-low-memory": False}


def prompt_flops(config: ModelConfig, tokens: int, chunk: int) -> float:
    """Floating-point operations of the graph for a prompt: two a weight and token, the chunkwise form, a head a chunk."""
    matrices = sum(rows * columns for name, (rows, *rest) in weight_shapes(config).items() for columns in rest if "layers" in name)
    per_head = chunk * (config.head_key_dim + config.head_value_dim) + 2 * config.head_key_dim * config.head_value_dim
    per_token = matrices + config.num_layers * config.num_heads * per_head
    return 2.0 * (tokens * per_token + tokens / chunk * config.vocab_size * config.hidden_size)


def product_rate(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a float32 product of two square matrices: the best of several."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    return 2e3 * size**3 / float(min(timed_ms(lambda: a @ a) for _ in range(repeats)))


def read(runner: Runner, prompt: np.ndarray, chunk: int) -> None:
    """Read a prompt (T,), at most `chunk` tokens at a time."""
    for begin in range(0, len(prompt), chunk):
        part = prompt[None, begin : begin + chunk]
        runner.prefill(part, np.array([part.shape[1]]))


def speed(bundle: Bundle, tokens: int, threads: int, repeats: int) -> None:
    """Questions 1 and 2; chunk sizes take turns, so that a disturbance meets all."""
    config = bundle.manifest.model
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, tokens, dtype=np.int64)
    runner = load(bundle.path, "onnxruntime", threads=threads, check_hashes=False).backend.open_runner(1)
    chunks = [chunk for chunk in CHUNKS if chunk <= tokens]
    times: dict[int, list[float]] = {chunk: [] for chunk in (1, *chunks)}
    for chunk in chunks:
        read(runner, prompt[None, :chunk], chunk)  # warm-up
    for _ in range(repeats):
        for chunk in chunks:
            times[chunk].append(timed_ms(partial(read, runner, prompt[None], chunk)))
        times[1] += [tokens * timed_ms(partial(runner.step, token)) for token in prompt[: STEPS // repeats, None]]
    bandwidth, rate = read_bandwidth(threads), product_rate()
    print(f"\n{tokens} tokens, median [10 %, 90 %] of {repeats}; floor at {rate / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.1f} GB/s")
    print("| chunk | prompt, ms                 | tokens/s | against steps | floor, ms | reached |")
    print("|-------|----------------------------|----------|---------------|-----------|---------|")
    stepping = Sample(times[1])
    for chunk, values in times.items():
        sample = Sample(values)
        floor = 1e3 * max(prompt_flops(config, tokens, chunk) / rate, tokens / chunk * bundle.manifest.weights_bytes / bandwidth)
        print(
            f"| {chunk if chunk > 1 else 'steps':>5} | {sample!s:26} | {1e3 * tokens / sample.median:8.0f} | "
            f"{stepping.median / sample.median:12.1f}× | {floor:9.0f} | {floor / sample.median:7.0%} |"
        )


@dataclass(frozen=True)
class Footprint:
    """A process that read a prompt and generated tokens; bytes, above what Python with numpy and ONNX Runtime holds.

    Attributes:
        resident, anonymous, peak: resident in all; not backed by a file; the largest resident ever.
        load_ms: opening the bundle.
        prompt_ms: reading the prompt the second time.
        step_ms: one step, median.
    """

    resident: int
    anonymous: int
    peak: int
    load_ms: float
    prompt_ms: float
    step_ms: float


def footprint(path: Path, low_memory: bool | None, tokens: int, threads: int) -> Footprint:
    """Question 3, for one way of holding the weights; meant for a fresh process."""
    import onnxruntime  # noqa: F401 (its libraries are not the bundle's)

    def resident(field: str, file: str = "smaps_rollup") -> int:
        line = next(line for line in Path(f"/proc/self/{file}").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    before, anonymous = resident("Rss:"), resident("Anonymous:")
    began = time.perf_counter()
    model = load(path, "onnxruntime", threads=threads, low_memory=low_memory, check_hashes=False)
    load_ms = 1e3 * (time.perf_counter() - began)
    session = model.session()
    # Every token once, as far as the prompt reaches: the embedding is read as a file, page by page.
    prompt = np.linspace(0, model.bundle.manifest.model.vocab_size - 1, tokens).astype(np.int64).tolist()
    session.feed(prompt)
    prompt_ms = timed_ms(lambda: session.feed(prompt))
    steps = [timed_ms(partial(session.step, [token])) for token in prompt[:STEPS]]
    return Footprint(
        resident=resident("Rss:") - before,
        anonymous=resident("Anonymous:") - anonymous,
        peak=resident("VmHWM:", "status") - before,
        load_ms=load_ms,
        prompt_ms=prompt_ms,
        step_ms=float(np.median(steps)),
    )


def memory(bundle: Bundle, tokens: int, threads: int) -> None:
    """Question 3, each way in a separate process."""
    manifest = bundle.manifest
    needed = manifest.weights_bytes + manifest.state_bytes
    print(f"\nweights and state {needed / 1e6:.0f} MB; after reading {tokens} tokens twice and {STEPS} steps")
    print("| weights held      | resident | of weights and state | anonymous | peak     | load    | prompt      | step     |")
    print("|-------------------|----------|----------------------|-----------|----------|---------|-------------|----------|")
    for name, low_memory in MODES.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(footprint, bundle.path, low_memory, tokens, threads).result()
        print(
            f"| {name:17} | {found.resident / 1e6:5.0f} MB | {found.resident / needed:19.2f}× | {found.anonymous / 1e6:6.0f} MB | "
            f"{found.peak / 1e6:5.0f} MB | {found.load_ms:4.0f} ms | {1e3 * tokens / found.prompt_ms:3.0f} tokens/s | "
            f"{found.step_ms:5.2f} ms |"
        )


def main(
    size: Annotated[str, typer.Option(help="The random model: 148M, 1.5B, …")] = "148M",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="How often each chunk size is measured.")] = 5,
    bundle: Annotated[Path | None, typer.Option(help="Measure this bundle instead, a quantized one for example.")] = None,
) -> None:
    """Measure prefill on the CPU."""
    from retnet_export.runtime.bundle.bundle import open_bundle

    print(describe_machine())
    opened = random_bundle(size) if bundle is None else open_bundle(bundle, check_hashes=False)
    print(f"{opened.manifest.name}: {parameters(opened.manifest.model) / 1e6:.0f}M parameters, {opened.manifest.precision.weights}")
    speed(opened, prompt, threads, repeats)
    memory(opened, prompt, threads)


if __name__ == "__main__":
    typer.run(main)
