"""Decode and prefill on one NVIDIA GPU through ONNX Runtime, against the memory bus.

A step of decode reads every weight once, and reads and writes the state once: bytes over measured copy bandwidth is the
least time it can take. This writes random models of the paper's proportions (speed does not depend on the weights), runs
them through the backend `onnxruntime-cuda`, and prints how near each step comes to that floor.

    python benchmarks/gpu.py                                      the table of docs/lab, within ten minutes on an H100
    python benchmarks/gpu.py --models 1.5B --formats fp16 --ablation --profile     what each rewrite brings, and each kernel

A token costs: tokens in, one step, the largest logit's token out, which is what greedy generation does.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import MODELS, BenchmarkBundle, write_bundle

from retnet_export.graph.variants import ONNXRUNTIME_CUDA
from retnet_export.runtime.backends import onnxruntime_cuda
from retnet_export.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend, OnnxRuntimeCudaStream
from retnet_export.runtime.device import cuda

GIGA = 1e9
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians over steps, of a greedy loop and of steps alone."""

    model: str
    format: str
    variant: str
    graphs: bool
    batch: int
    ms: float
    ms_low: float
    ms_high: float
    ms_steps_only: float
    tokens_per_second: float
    gigabytes_per_step: float
    floor_ms: float
    share: float
    device_gigabytes: float


def copy_bandwidth(size: int = 4 << 30, repeats: int = 10) -> float:
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    stream, source, target = cuda.Stream(), cuda.DeviceBuffer(size), cuda.DeviceBuffer(size)
    stream.fill(source, 0x3C)
    times = []
    for _ in range(repeats + 2):
        begin, end = cuda.Event(), cuda.Event()
        stream.record(begin)
        stream.copy(target, source)
        stream.record(end)
        times.append(end.milliseconds_since(begin))
    source.close()
    target.close()
    return 2 * size / (statistics.median(times[2:]) * 1e-3)


def time_steps(stream: OnnxRuntimeCudaStream, steps: int) -> tuple[list[float], float]:
    """Milliseconds of each step of a greedy loop, and of a step when nothing is fetched."""
    tokens = np.zeros(stream.batch, np.int64)
    times = []
    for _ in range(steps + 5):
        began = time.perf_counter()
        stream.step(tokens)
        tokens = stream.top(1)[0][:, 0].copy()
        times.append(1e3 * (time.perf_counter() - began))
    began = time.perf_counter()
    for _ in range(steps):
        stream.step(tokens)
    stream.logits()
    return times[5:], 1e3 * (time.perf_counter() - began) / steps


def measure_decode(
    name: str,
    fmt: str,
    variant: str,
    made: BenchmarkBundle,
    batches: list[int],
    bandwidth: float,
    steps: int,
    graphs: bool = True,
    low_memory: bool = False,
    session_options: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of one model, a batch at a time; a batch that does not fit is reported and skipped."""
    onnxruntime_cuda.SESSION_OPTIONS.update(session_options or {})
    rows = []
    free_before = cuda.memory_info().free
    began = time.perf_counter()
    backend = OnnxRuntimeCudaBackend(made.bundle, graphs=graphs, low_memory=low_memory)
    load_seconds = time.perf_counter() - began
    for batch in batches:
        try:
            stream = backend.open_stream(batch)
            times, alone = time_steps(stream, steps if batch < 64 else max(steps // 3, 5))
        except cuda.CudaMemoryError as error:
            print(f"{name} {fmt} batch {batch}: {error}", flush=True)
            continue
        used = free_before - cuda.memory_info().free
        moved = made.bytes_per_step(batch)
        ms = statistics.median(times)
        floor = 1e3 * moved / bandwidth
        ordered = sorted(times)
        row = Row(
            name, fmt, variant, graphs, batch, ms, ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10], alone,
            1e3 * batch / ms, moved / GIGA, floor, floor / ms, used / GIGA,
        )  # fmt: skip
        print_row(row, load_seconds)
        rows.append(row)
        del stream
        gc.collect()
    return rows


def measure_prefill(name: str, fmt: str, variant: str, made: BenchmarkBundle, batch: int, chunk: int) -> dict[str, Any]:
    """Tokens per second of reading prompts chunk by chunk, and what both graphs take on the device."""
    free_before = cuda.memory_info().free
    backend = OnnxRuntimeCudaBackend(made.bundle, graphs=False)
    stream = backend.open_stream(batch)
    tokens = np.random.default_rng(0).integers(0, made.bundle.manifest.model.vocab_size, (batch, chunk))
    lengths = np.full(batch, chunk)
    times = []
    for _ in range(13):
        began = time.perf_counter()
        stream.prefill(tokens, lengths)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[3:])
    result = {"model": name, "format": fmt, "variant": variant, "batch": batch, "chunk": chunk, "ms": 1e3 * seconds}
    result["tokens_per_second"] = batch * chunk / seconds
    stream.step(tokens[:, 0])
    stream.logits()
    result["device_gigabytes"] = (free_before - cuda.memory_info().free) / GIGA
    print(f"prefill {name} {fmt} {variant} batch {batch} chunk {chunk}: {1e3 * seconds:.2f} ms "
          f"[{1e3 * min(times):.2f}, {1e3 * max(times[3:]):.2f}], {result['tokens_per_second']:,.0f} tokens/s; "
          f"both graphs {result['device_gigabytes']:.2f} GB on the device", flush=True)  # fmt: skip
    return result


def profile(name: str, fmt: str, variant: str, made: BenchmarkBundle, steps: int = 10) -> list[dict[str, Any]]:
    """Kernels of a step by total time, through PyTorch's profiler, which sees every kernel of the process."""
    import torch
    from torch.profiler import ProfilerActivity

    backend = OnnxRuntimeCudaBackend(made.bundle)
    stream = backend.open_stream(1)
    time_steps(stream, 5)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            stream.step(np.zeros(1, np.int64))
        stream.logits()
    table: dict[str, list[float]] = {}
    spans = []
    for event in record.events():
        if event.device_type.name == "CUDA":
            table.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
            spans.append((event.time_range.start, event.time_range.end))
    rows: list[dict[str, Any]] = [
        {
            "kernel": kernel,
            "calls_per_step": len(times) / steps,
            "us_each": statistics.median(times),
            "us_per_step": sum(times) / steps,
        }
        for kernel, times in table.items()
    ]
    rows.sort(key=lambda row: -row["us_per_step"])
    busy = sum(row["us_per_step"] for row in rows)
    spans.sort()
    whole = (spans[-1][1] - spans[0][0]) / steps
    kernels = sum(row["calls_per_step"] for row in rows)
    print(f"\nkernels of a step, {name} {fmt} {variant}: busy {busy:.0f} us of {whole:.0f}, {kernels:.0f} kernels")
    for row in rows[:24]:
        print(f"{row['us_per_step']:9.1f} us {row['calls_per_step']:7.1f} × {row['us_each']:8.2f}  {row['kernel'][:150]}")
    sys.stdout.flush()
    return rows


def print_row(row: Row, load_seconds: float) -> None:
    kind = "graph" if row.graphs else "plain"
    print(
        f"{row.model:5} {row.format:5} {row.variant:28} {kind} B={row.batch:<3} {row.ms:8.3f} ms "
        f"[{row.ms_low:.3f}, {row.ms_high:.3f}], steps alone {row.ms_steps_only:8.3f}; "
        f"{row.tokens_per_second:9.1f} tokens/s; {row.gigabytes_per_step:7.3f} GB, "
        f"floor {row.floor_ms:7.3f} ms: {100 * row.share:5.1f} %; {row.device_gigabytes:6.2f} GB on the device, "
        f"loaded in {load_seconds:.1f} s",
        flush=True,
    )


def ablation() -> dict[str, Any]:
    """Rewrites added one after another, in the order of the variant."""
    steps: dict[str, Any] = {"portable": ()}
    for count, each in enumerate(ONNXRUNTIME_CUDA, 1):
        if each.__name__ not in (
            "SumAsAddPass",
            "SinkCastsPass",
            "ValueMajorStatePass",
            "MatMulNBitsPass",
        ):  # they prepare, or do nothing here
            steps[f"+ {each.__name__}"] = ONNXRUNTIME_CUDA[:count]
    steps["onnxruntime-cuda"] = steps.pop(f"+ {ONNXRUNTIME_CUDA[-1].__name__}")
    return steps


def alone(work: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """A function's result from a process of its own: the stream of one measurement would slow the next one (docs/lab)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()


def describe() -> dict[str, Any]:
    """The device, and what everything is held against."""
    import onnxruntime

    return {
        "device": cuda.device().name, "driver_cuda": cuda.versions()[0], "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(), "copy_bandwidth_gb_s": copy_bandwidth() / GIGA,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.5B,7.8B")
    parser.add_argument("--formats", default="fp16,int4")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill chunk; 0 leaves prefill out")
    parser.add_argument("--ablation", action="store_true", help="also each rewrite and option by itself, at batch 1")
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step, at batch 1 (needs torch)")
    parser.add_argument("--folder", type=Path, default=None, help="where models are written; the system's temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    options = parser.parse_args()
    reason = alone(onnxruntime_cuda.unavailable)
    if reason:
        raise SystemExit(reason)
    head = alone(describe) | {"steps": options.steps}
    bandwidth = GIGA * head["copy_bandwidth_gb_s"]
    print(json.dumps(head), flush=True)
    results = Results()
    began = time.perf_counter()
    for name in options.models.split(","):
        for fmt in options.formats.split(","):
            run_model(name, fmt, options, bandwidth, results)
            print(f"{time.perf_counter() - began:.0f} s so far", flush=True)
    if options.json:
        options.json.write_text(json.dumps(head | results.document(), indent=1))
    sys.exit(results.failed)


@dataclass
class Results:
    """What has been measured; a fault in one part must not cost the rest, so it is printed and remembered."""

    decode: list[Row] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (reported, and the exit code says so)
            self.failed = True
            print(f"FAILED {what}: {type(error).__name__}: {str(error)[:600]}", flush=True)

    def document(self) -> dict[str, Any]:
        return {"decode": [asdict(row) for row in self.decode], "prefill": self.prefill, "kernels": self.kernels}


def run_model(name: str, fmt: str, options: argparse.Namespace, bandwidth: float, results: Results) -> None:
    """Write one model, measure what was asked for, and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-", dir=options.folder))
    batches, full = [int(batch) for batch in options.batches.split(",")], "onnxruntime-cuda"
    try:
        start = time.perf_counter()
        variants = ablation() if options.ablation and fmt == "fp16" else {full: ONNXRUNTIME_CUDA}
        made = write_bundle(folder, MODELS[name], fmt, variants, max(options.chunk, 1))
        size = (folder / "weights.bin").stat().st_size
        print(f"{name} {fmt}: {size / GIGA:.2f} GB of random weights written in {time.perf_counter() - start:.1f} s", flush=True)

        def decode(variant: str, at: list[int], **how: Any) -> None:
            label = ", ".join([variant, *(key for key, value in how.items() if value is True)])
            with results.part(f"{name} {fmt} {label}"):
                arguments = name, fmt, label, made[variant], at, bandwidth, options.steps
                results.decode.extend(alone(measure_decode, *arguments, **how))

        decode(full, batches)
        decode(full, batches[:1], graphs=False)
        if fmt != "fp16" and len(batches) > 1:
            decode(full, batches[1:], low_memory=True)
        for variant in made:
            if variant != full:
                decode(variant, batches[:1])
        if options.ablation:
            changed = {"ep.cuda.enable_gemm_auto_tune": "0"} if fmt == "fp16" else {"ep.cuda.fpa_intb_gemm": "1"}
            print(f"with {changed}:")
            decode(full, batches[:1], session_options=changed)
        if options.chunk:
            with results.part(f"{name} {fmt} prefill"):
                results.prefill.append(alone(measure_prefill, name, fmt, full, made[full], 1, options.chunk))
        if options.profile:
            with results.part(f"{name} {fmt} profile"):
                results.kernels[f"{name} {fmt}"] = alone(profile, name, fmt, full, made[full])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
