"""What the benchmarks share: model sizes, random bundles, the machine's description, bandwidth.

Weights are random: speed does not depend on them. Random bundles are kept in .cache/benchmarks, so that a second run
starts at once.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from random_weights import random_weights

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.device.doctor import package_versions
from retnet_export.runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "benchmarks"


def retnet(layers: int, width: int, heads: int, ffn: int, vocab: int = 32_000) -> ModelConfig:
    """A RetNet of the paper's proportions: Dk = width/heads, Dv = 2·Dk."""
    dim = width // heads
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_key_dim=dim,
        head_value_dim=2 * dim,
        ffn_size=ffn,
    )


SIZES: Mapping[str, ModelConfig] = {
    "148M": retnet(12, 768, 3, 1536),
    "1.5B": retnet(24, 2048, 8, 4096),
    "7.8B": retnet(32, 4096, 16, 8192),
}


def parameters(config: ModelConfig) -> int:
    """How many weights a model has."""
    return sum(int(np.prod(shape)) for shape in weight_shapes(config).values())


def random_bundle(size: str, **options: object) -> Bundle:
    """A bundle of random weights of one of `SIZES`, from the cache if it is there; `options` are those of the export."""
    suffix = "".join(f"-{name}-{value}" for name, value in sorted(options.items()))
    target = CACHE / f"random-{size}{suffix}.retnet"
    if target.exists():
        try:
            return open_bundle(target, check_hashes=False)
        except UserError:
            pass  # written by another version: write it again
    config = SIZES[size]
    weights = random_weights(config)
    checkpoint = Checkpoint(path=target, family="random", config=config, weight=weights.__getitem__, files=())
    return export_bundle(checkpoint, target, ExportOptions(**options), force=True)  # type: ignore[arg-type]


def read_bandwidth(threads: int, size_bytes: int = 1 << 30, repeats: int = 7) -> float:
    """Bytes per second at which this machine's cores read memory: the best of several sums over an array too large for caches."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.array_split(np.ones(size_bytes // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(lambda part: part.max(), parts))
            best = min(best, time.perf_counter() - began)
    return size_bytes / best


def describe_machine() -> str:
    """One line for the head of every table."""
    from retnet_export.runtime.device.doctor import examine

    machine = examine()["machine"]
    versions = package_versions("onnxruntime", "onnxruntime-gpu", "numpy")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['processor']}, {os.cpu_count()} cores, {machine['memory']}; Python {platform.python_version()}, {packages}"
