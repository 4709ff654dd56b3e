"""Tokens per second from bytes: a roofline, with its two constants fitted to figures that were measured.

    milliseconds per step  =  bytes moved / (efficiency · bandwidth)  +  layers · (overhead + (B - 1) · overhead per sequence)

A decode step is bound by memory: it reads every matrix once. What a device does not reach of its bandwidth is the efficiency;
what a layer costs however small it is (launching kernels, waiting between them) is the overhead. Each runtime has constants
of its own, fitted to all its rows in `MEASUREMENTS` so that the relative error is least. The spread of measured over predicted
among those rows is the range that is printed with every prediction.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retnet_export.plan.devices import DEVICES, DeviceSpec
from retnet_export.plan.sizes import Sizes
from retnet_export.runtime.backends import registered
from retnet_export.runtime.bundle.anatomy import Anatomy


@dataclass(frozen=True)
class Measurement:
    """A measured decode speed.

    Attributes:
        runtime: what ran it.
        device: on what, a key of `DEVICES`.
        model: what it was.
        layers: its depth.
        matrix_bytes: what every step reads, whatever the batch.
        state_bytes: of one sequence; 0 for a Transformer at a short context.
        batch: sequences that step together.
        milliseconds: per step.
    """

    runtime: str
    device: str
    model: str
    layers: int
    matrix_bytes: float
    state_bytes: float
    batch: int
    milliseconds: float


def _transformer(name: str, layers: int, width: int, key_heads: int, query_heads: int, ffn: int) -> tuple[str, int, float]:
    """A Qwen3 in INT4 AWQ: groups of 128 with a float16 scale, a float16 output head over 151,936 tokens, heads of 128."""
    matrices = layers * width * (2 * query_heads * 128 + 2 * key_heads * 128 + 3 * ffn)
    return name, layers, matrices * (0.5 + 2 / 128) + 151936 * width * 2


_QWEN3_06B = _transformer("Qwen3-0.6B int4", 28, 1024, 8, 16, 3072)
_QWEN3_17B = _transformer("Qwen3-1.7B int4", 28, 2048, 8, 16, 6144)
_QWEN3_4B = _transformer("Qwen3-4B int4", 36, 2560, 8, 32, 9728)
_QWEN3_8B = _transformer("Qwen3-8B int4", 36, 4096, 8, 32, 12288)


def _published(device: str, *rows: tuple[tuple[str, int, float], float]) -> tuple[Measurement, ...]:
    return tuple(Measurement("tensorrt", device, *model, 0.0, 1, 1e3 / rate) for model, rate in rows)


def _on_h100(model: str, layers: int, matrix_bytes: float, state_bytes: float, *rows: tuple[int, float]) -> tuple[Measurement, ...]:
    return tuple(
        Measurement("cuda", "h100", model, layers, matrix_bytes, state_bytes, batch, milliseconds) for batch, milliseconds in rows
    )


MEASUREMENTS: tuple[Measurement, ...] = (
    # Published by NVIDIA for TensorRT-Edge-LLM 0.9.0, batch 1, INT4 AWQ, tokens per second. These are Transformers on a
    # runtime with kernels of its own, so for a RetNet on plain TensorRT they say what the hardware gives, not what we reach.
    # The Orin Nano's power mode is not given; its figures fit the ordinary mode (68 GB/s), not the Super mode.
    *_published("agx-orin-64gb", (_QWEN3_06B, 186), (_QWEN3_17B, 99), (_QWEN3_4B, 53), (_QWEN3_8B, 32.5)),
    *_published("orin-nx-16gb", (_QWEN3_06B, 117), (_QWEN3_17B, 60), (_QWEN3_4B, 32), (_QWEN3_8B, 19)),
    *_published("orin-nano-8gb", (_QWEN3_06B, 73), (_QWEN3_17B, 37)),
    # Measured by this project, docs/lab/step-h100.md and gpu-batches.md: the backend cuda, greedy loop, float32 state.
    *_on_h100("RetNet 1.5B fp16", 24, 2.95e9, 100.7e6, (1, 1.298), (8, 1.856), (64, 4.824)),
    *_on_h100("RetNet 1.5B int8", 24, 1.48e9, 100.7e6, (1, 0.930), (8, 1.493), (64, 4.567)),
    *_on_h100("RetNet 1.5B int4", 24, 0.78e9, 100.7e6, (1, 0.625), (8, 1.281), (64, 4.522)),
    *_on_h100("RetNet 7.8B fp16", 32, 15.29e9, 268.4e6, (1, 5.605), (8, 6.854), (64, 14.964)),
    *_on_h100("RetNet 7.8B int8", 32, 7.64e9, 268.4e6, (1, 3.345), (8, 4.575), (64, 13.021)),
    *_on_h100("RetNet 7.8B int4", 32, 4.06e9, 268.4e6, (1, 2.124), (8, 3.484), (64, 12.511)),
    # Measured: ONNX Runtime 1.32.0 CPU, 12 layers of width 768, 3 heads of 256 × 512, float32 state.
    Measurement("onnxruntime", "cpu-2-cores", "RetNet 148M fp32", 12, 592e6, 18.9e6, 1, 18.5),
    Measurement("onnxruntime", "cpu-2-cores", "RetNet 148M int8", 12, 152e6, 18.9e6, 1, 8.6),
    Measurement("onnxruntime", "cpu-2-cores", "RetNet 148M int4", 12, 92e6, 18.9e6, 1, 6.7),
)


@dataclass(frozen=True)
class Fit:
    """The constants of one runtime.

    Attributes:
        efficiency: share of the bandwidth that is reached.
        overhead_ms: per layer.
        sequence_overhead_ms: per layer and sequence beyond the first; 0 where no batch was measured.
        slowest, fastest: the least and the greatest measured speed over the predicted one.
    """

    efficiency: float
    overhead_ms: float
    sequence_overhead_ms: float
    slowest: float
    fastest: float

    def milliseconds(self, bandwidth_gbs: float, bytes_moved: float, layers: float, batch: int) -> float:
        """The predicted time of a step."""
        constants = np.array([1 / self.efficiency, self.overhead_ms, self.sequence_overhead_ms])
        return float(features(bandwidth_gbs, bytes_moved, layers, batch) @ constants)


def features(bandwidth_gbs: float, bytes_moved: float, layers: float, batch: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What the constants of a `Fit` are multiplied by, in its order, (3,)."""
    return np.array([bytes_moved / bandwidth_gbs / 1e6, layers, layers * (batch - 1)], np.float64)


def _bytes_of(row: Measurement) -> float:
    return row.matrix_bytes + row.batch * row.state_bytes * registered(row.runtime).passes(row.batch)


@functools.cache
def fit(runtime: str) -> Fit:
    """Fit a runtime's constants to its rows, each error relative to its row."""
    rows = [row for row in MEASUREMENTS if row.runtime == runtime]
    table = np.array([features(DEVICES[row.device].bandwidth_gbs, _bytes_of(row), row.layers, row.batch) for row in rows])
    times = np.array([row.milliseconds for row in rows])
    # Without a batch among the rows the last column is zero, and least squares leaves its constant at zero.
    constants = np.linalg.lstsq(table / times[:, None], np.ones(len(rows)), rcond=None)[0]
    ratios = (table @ constants) / times  # measured speed over predicted speed
    return Fit(1 / constants[0], constants[1], constants[2], float(ratios.min()), float(ratios.max()))


def check_against_measurements() -> list[tuple[Measurement, float]]:
    """Every measurement with the prediction for it, in milliseconds: what docs/lab/plan.md shows."""
    return [
        (row, fit(row.runtime).milliseconds(DEVICES[row.device].bandwidth_gbs, _bytes_of(row), row.layers, row.batch))
        for row in MEASUREMENTS
    ]


@dataclass(frozen=True)
class Prediction:
    """The prediction for a model on a device.

    Attributes:
        bytes_per_step: bytes that a step moves.
        kernels: that a step launches; None where no engine says it.
        tokens_per_second: of all sequences together.
        low, high: the range, from the spread of the figures that the constants were fitted to.
        transformer: tokens per second of a Transformer of the same size with a key-value cache, by tokens in the cache; None
            where the cache does not fit beside the weights.
    """

    bytes_per_step: float
    kernels: int | None
    tokens_per_second: float
    low: float
    high: float
    transformer: Mapping[int, float | None]


KERNELS_PER_LAYER = 10
"""Kernels for which the overhead of a layer was fitted: two norms, four products, rotation, attention, activation, residual."""

CONTEXTS = (0, 2048, 8192, 32768)
"""Tokens in the Transformer's cache for the comparison."""


def predict(
    sizes: Sizes, device: DeviceSpec, batch: int = 1, step: Anatomy | None = None, constants: Fit | None = None
) -> Prediction:
    """Predict the decode speed of a model on a device.

    The constants are those of the device's runtime, or those given: of a calibration.

    Without an engine a step is taken to move what its form should. With one, bytes are what the engine moves, and the overhead of a
    layer grows with the kernels that the engine launches for it.

    The Transformer of the same size reads the same matrices and, in place of the state, its cache: float16 keys and values of
    the model's width, for all its heads.
    """
    constants, layers = constants or fit(device.runtime), sizes.config.num_layers
    bytes_per_step, like = sizes.bytes_per_step(batch, state_passes=registered(device.runtime).passes(batch)), float(layers)
    if step is not None:
        bytes_per_step = float(step.weight_bytes + batch * (step.state_bytes + step.other_bytes))
        like = step.kernels / KERNELS_PER_LAYER
    rate = 1e3 * batch / constants.milliseconds(device.bandwidth_gbs, bytes_per_step, like, batch)
    transformer: dict[int, float | None] = {}
    for context in CONTEXTS:
        cache = batch * context * sizes.kv_bytes_per_token
        if sizes.weights_bytes + cache > device.usable_bytes:
            transformer[context] = None
            continue
        moved = sizes.bytes_per_step(batch, state_passes=0.0) + cache
        transformer[context] = 1e3 * batch / constants.milliseconds(device.bandwidth_gbs, moved, layers, batch)
    kernels = None if step is None else step.kernels
    return Prediction(bytes_per_step, kernels, rate, rate * constants.slowest, rate * constants.fastest, transformer)
