"""The step kernel of the backend `cuda` alone: tokens a second of one sequence against the memory bus, on random weights.

    python benchmarks/step.py                        the table of docs/lab/step-h100.md; 20 s on an H100, no files
    python benchmarks/step.py --ptx 8.7              the same as the code that a Jetson Orin would run

A token is: token in, one step, the token of the largest logit out, as in greedy generation. "Kernel" is steps one after another,
whose tokens stay on the device. Random bytes are drawn once and repeated: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import MODELS

from retnet_export.runtime.backends.cuda import backend as cuda_backend
from retnet_export.runtime.backends.cuda import compiler, sources, weights
from retnet_export.runtime.backends.cuda.layout import Kind, MatrixLayout
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.external_data import StoredInitializer
from retnet_export.runtime.bundle.manifest import state_specs
from retnet_export.runtime.device import cuda

FORMATS: dict[str, tuple[Kind, int | None]] = {"fp16": ("float16", None), "int8": ("int8", None), "int4": ("int4", 64)}


class RandomWeights(weights.DeviceWeights):
    """Weights that never were in a file."""

    def load(self, stream: cuda.Stream, capability: tuple[int, int]) -> None:
        self._buffer = cuda.DeviceBuffer(self.places.bytes)
        block = (np.random.default_rng(0).standard_normal(1 << 23) * 0.02).astype(np.float16)
        first = cuda.DeviceBuffer(block.nbytes)
        stream.copy_to_device(first, block)
        for start in range(0, self.places.bytes, block.nbytes):
            stream.copy(self._buffer, first, min(block.nbytes, self.places.bytes - start), start, 0)
        vectors = np.ones(self.layer_vectors.size * self.config.num_layers + self.model_vectors.size, np.float32)
        gamma = self.layer_vectors.size * self.config.num_layers + self.model_vectors["gamma"]
        vectors[gamma : gamma + self.config.num_heads] = self.config.gamma
        phases = weights.phase_per_token(self.config)
        stream.copy_to_device(self._buffer, vectors, self.places.vectors)
        stream.copy_to_device(self._buffer, phases, self.places.phases)
        stream.synchronize()


def random_model(config: ModelConfig, kind: Kind, group: int | None) -> tuple[Any, RandomWeights]:
    """What the backend asks of a bundle, and weights for it."""

    def stored(name: str, *shape: int) -> StoredInitializer:
        return StoredInitializer(name, 1, shape, "", 0, None, frozenset())

    def matrix(rows: int, columns: int, *, of: Kind = kind, interleaved: bool = False) -> sources.MatrixSource:
        layout = MatrixLayout(rows, columns, of, group if of == kind else None, "float16", interleaved)
        return sources.MatrixSource(layout, stored("w", columns, rows), False, stored("s", 1))

    layer = {
        "projections": matrix(2 * config.key_size + 2 * config.value_size, config.hidden_size),
        "out": matrix(config.hidden_size, config.value_size),
        "up": matrix(2 * config.ffn_size, config.hidden_size, interleaved=True),
        "down": matrix(config.hidden_size, config.ffn_size),
    }
    vectors = {"norm.weight": stored("norm.weight", config.hidden_size)}
    for index in range(config.num_layers):
        for name, size in (("retention_norm", config.hidden_size), ("ffn_norm", config.hidden_size)):
            vectors[f"layers.{index}.{name}.weight"] = stored(name, size)
        vectors[f"layers.{index}.retention.head_norm.weight"] = stored("head_norm", config.head_value_dim)
    head = matrix(config.vocab_size, config.hidden_size)
    embedding = matrix(config.vocab_size, config.hidden_size, of="float16")
    found = sources.Sources((layer,) * config.num_layers, head, embedding, vectors)
    manifest = SimpleNamespace(
        model=config,
        precision=SimpleNamespace(compute="float16"),
        graphs={"decode": SimpleNamespace(inputs=(SimpleNamespace(shape=(-1, 1)),))},
        state=state_specs(config, "float32"),
        quantization=None,
    )
    return SimpleNamespace(manifest=manifest, path=Path("random")), RandomWeights(config, Path(), found)


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Gigabytes a second of a large copy on the device, read and written bytes both counted."""
    stream, source, target = cuda_backend.shared_stream(), cuda.DeviceBuffer(size), cuda.DeviceBuffer(size)
    stream.fill(source, 0x3C)
    times = []
    for _ in range(12):
        begin, end = cuda.Event(), cuda.Event()
        stream.record(begin)
        stream.copy(target, source)
        stream.record(end)
        times.append(end.milliseconds_since(begin))
    return 2 * size / statistics.median(times[2:]) / 1e6


def measure(name: str, fmt: str, bandwidth: float, ptx: tuple[int, int] | None, steps: int = 60) -> None:
    free = cuda.memory_info().free
    bundle, random = random_model(MODELS[name], *FORMATS[fmt])
    backend = cuda_backend.CudaBackend(bundle, weights=random, ptx=ptx)
    runner, tokens, times = backend.open_runner(1), np.zeros(1, np.int64), []
    used = free - cuda.memory_info().free
    for _ in range(steps + 5):
        began = time.perf_counter()
        runner.step(tokens)
        tokens = runner.top(1)[0][:, 0]
        times.append(1e3 * (time.perf_counter() - began))
    begin, end = cuda.Event(), cuda.Event()
    backend.stream.record(begin)
    for _ in range(steps):
        runner.step(tokens)
    backend.stream.record(end)
    kernel, ms, ordered = end.milliseconds_since(begin) / steps, statistics.median(times[5:]), sorted(times[5:])
    config, sources = random.config, random.sources
    read = config.num_layers * sum(each.layout.bytes for each in sources.layers[0].values()) + sources.head.layout.bytes
    gigabytes = (read + 8 * config.state_elements) / 1e9
    print(
        f"| {name} | {fmt} | {ms:.3f} [{ordered[steps // 10]:.3f}, {ordered[-1 - steps // 10]:.3f}] | {1e3 / ms:,.0f} | "
        f"{1e5 * gigabytes / ms / bandwidth:.1f} % | {kernel:.3f} | {gigabytes:.2f} | {used / 1e9:.2f} "
        f"({random.bytes / 1e9:.2f} + {4 * config.state_elements / 1e9:.2f}) |",
        flush=True,
    )
    del backend, runner, random
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.5B,7.8B")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--ptx", help="compute capability whose PTX is to run, as 8.7")
    options = parser.parse_args()
    if reason := cuda_backend.unavailable():
        raise SystemExit(reason)
    major, _, minor = (options.ptx or "").partition(".")
    ptx = (int(major), int(minor)) if options.ptx else None
    bandwidth = copy_bandwidth()
    device, (driver, _) = cuda.device(), cuda.versions()
    print(f"{device.name}, driver {driver}, NVRTC {compiler.compiler_version()}, copy {bandwidth:,.0f} GB/s, medians of 60 steps")
    print("| model | weights | ms a token | tokens/s | share | kernel, ms | GB a step | GB on the device (weights + state) |")
    for name in options.models.split(","):
        for fmt in options.formats.split(","):
            measure(name, fmt, bandwidth, ptx)


if __name__ == "__main__":
    main()
