"""Weights in four and eight bits: symmetric, a scale for each output channel or for each block of inputs of an output channel.

    weight[k, n] ≈ values[k, n] · scales[k // group_size, n]

Rule: what this module rounds is what the file stores and what every runtime computes with. Scales are rounded to the
element type of the file before the values are chosen, and the zero point is 0 (TensorRT knows no other).

Values are integers, or floats of eight bits (E4M3: a sign, 4 bits of exponent, 3 of mantissa, up to 448). The steps of a float
grow with the weight, so a largest weight that is clipped gains nothing: its scale is the largest weight over 448, unsearched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Bits = Literal[4, 8]

FLOAT8_LARGEST = 448
"""The largest E4M3 number."""
SMALLEST_SCALES: Mapping[str, float] = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}
"""The smallest scale by its type. Nothing but zeros may be lost below it: models with small weights and large norms are as good
as others. float32 and bfloat16 stop at their smallest normal number, below which some GPUs read 0; no model comes near it.
float16, whose normal numbers end at 2^-14, goes down to its smallest subnormal: every runtime keeps those, and since integers are
chosen after the scale is rounded, a scale of few bits costs a few hundredths of a step where a floor would cost the weights."""
CHUNK_ELEMENTS = 1 << 20
"""Weights searched at once: what fits in a cache, and bounds the memory of the search whatever the matrix."""


@dataclass(frozen=True)
class Format:
    """How the weights of a matrix are stored.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale; None: all inputs of an output.
        scale: element type of the scales, which is that of the product's operands.
        floating: FP8, E4M3; of eight bits only.
    """

    bits: Bits
    group_size: int | None = None
    scale: str = "float32"
    floating: bool = False

    @property
    def name(self) -> str:
        """As on the command line: "int8", "int4", "fp8"."""
        return f"fp{self.bits}" if self.floating else f"int{self.bits}"

    @property
    def largest(self) -> int:
        """The largest weight. Of INT8 it is 119 = 16 · 7 + 7, which two four-bit planes hold (graph/tensorrt/planes.py)."""
        if self.floating:
            return FLOAT8_LARGEST
        return 7 if self.bits == 4 else 119

    @property
    def smallest(self) -> int:
        """The smallest weight."""
        return -FLOAT8_LARGEST if self.floating else -(1 << (self.bits - 1))

    @property
    def magnitude(self) -> int:
        """The largest magnitude that the type holds with either sign: what activations are rounded into."""
        return FLOAT8_LARGEST if self.floating else (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """NumPy's type of stored values: one byte each in memory, packed in the file."""
        if self.floating:
            return np.dtype(ml_dtypes.float8_e4m3fn)  # type: ignore[no-any-return]
        return np.dtype(ml_dtypes.int4) if self.bits == 4 else np.dtype(np.int8)

    @property
    def scale_dtype(self) -> np.dtype[np.generic]:
        return np.dtype(ml_dtypes.bfloat16) if self.scale == "bfloat16" else np.dtype(self.scale)

    def group(self, inputs: int) -> int:
        """Inputs that share a scale in a matrix of so many inputs."""
        return self.group_size or inputs


@dataclass(frozen=True)
class Quantized:
    """One matrix as it is stored.

    Attributes:
        format: how.
        values: int8 (inputs, outputs), within the range of the format; float8 of a floating one.
        scales: float32 (groups, outputs), exactly representable in the format's scale type.
    """

    format: Format
    values: NDArray[np.generic]
    scales: NDArray[np.float32]

    def dequantized(self) -> Matrix:
        """The weights that a runtime computes with, (inputs, outputs)."""
        group = self.values.shape[0] // self.scales.shape[0]
        return self.values.astype(np.float32) * np.repeat(self.scales, group, axis=0)

    def relative_error(self, weight: Matrix) -> float:
        """Root mean square error over the root mean square of the weights."""
        return float(np.linalg.norm(self.dequantized() - weight) / max(float(np.linalg.norm(weight)), 1e-30))


def round_to_nearest(weight: Matrix, form: Format, importance: NDArray[np.float32] | None = None) -> Quantized:
    """Each weight to the nearest multiple of its scale; each scale with the least squared error.

    Args:
        weight: (inputs, outputs).
        form: how to store it; its group size divides the inputs.
        importance: (inputs,), the weight of each input's squared error; all alike when None.
    """
    if form.floating:
        return _round_to_float8(weight, form)
    inputs, outputs = weight.shape
    group = form.group(inputs)
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty((inputs // group, outputs), np.float32)
    weights = np.ones(inputs, np.float32) if importance is None else importance
    for rows, columns in _chunks(inputs, outputs, group):
        block = weight[rows, columns].reshape(-1, group, columns.stop - columns.start)  # (groups, group, outputs)
        best = least_squares_scales(block, form, weights[rows].reshape(-1, group, 1))
        scales[rows.start // group : rows.stop // group, columns] = best
        values[rows, columns] = nearest(block, best[:, None], form).reshape(rows.stop - rows.start, -1)
    return Quantized(form, values, scales)


def _round_to_float8(weight: Matrix, form: Format) -> Quantized:
    """Each weight to the nearest float8; its largest is the largest weight of an output."""
    extreme = np.abs(weight).max(axis=0, keepdims=True)
    extreme[extreme == 0] = 1.0
    scales = stored_scales(extreme / np.float32(FLOAT8_LARGEST), form)
    # A cast beyond the largest value gives NaN, and a scale may have been rounded down.
    values = np.clip(weight / scales, -FLOAT8_LARGEST, FLOAT8_LARGEST).astype(form.dtype)
    return Quantized(form, values, scales)


def nearest(weight: Matrix, scale: Matrix, form: Format) -> NDArray[np.int8]:
    """weight / scale, rounded into the format's range."""
    return np.asarray(np.clip(np.rint(weight / scale), form.smallest, form.largest), np.int8)


def least_squares_scales(block: Matrix, form: Format, importance: NDArray[np.float32]) -> Matrix:
    """The scale of each group that loses least.

    The error over scales has many local minima, so a grid is searched: from the scale that keeps the largest weight down to
    one that clips it. The best of the grid is then refined: for fixed integers q, the best scale is ⟨w, q⟩ / ⟨q, q⟩.

    Args:
        block: weights (groups, group, outputs).
        form: the format.
        importance: (groups, group, 1).

    Returns:
        (groups, outputs), positive, representable in the format's scale type.
    """
    extreme = np.abs(block).max(axis=1)
    extreme[extreme == 0] = 1.0
    # Clipping pays where few steps are available: eight bits lose more by it than they win below 0.9.
    shares = np.linspace(0.6, 1.0, 17) if form.bits == 4 else np.linspace(0.9, 1.0, 5)
    best = stored_scales(extreme / form.largest, form)
    error = _error(block, best, form, importance)
    for share in shares[:-1]:
        best, error = _better(best, error, stored_scales(extreme * np.float32(share / form.largest), form), block, form, importance)
    for _ in range(2):
        q = nearest(block, best[:, None], form).astype(np.float32)
        weighted = q * importance
        norm = (weighted * q).sum(axis=1)
        refined = np.where(norm > 0, (weighted * block).sum(axis=1) / np.where(norm > 0, norm, 1), best)
        best, error = _better(best, error, stored_scales(refined, form), block, form, importance)
    return best


def _better(
    best: Matrix, error: Matrix, scale: Matrix, block: Matrix, form: Format, importance: NDArray[np.float32]
) -> tuple[Matrix, Matrix]:
    candidate = _error(block, scale, form, importance)
    wins = candidate < error
    return np.where(wins, scale, best), np.where(wins, candidate, error)


def _error(block: Matrix, scale: Matrix, form: Format, importance: NDArray[np.float32]) -> Matrix:
    rounded = np.clip(np.rint(block / scale[:, None]), form.smallest, form.largest)
    rounded *= scale[:, None]
    rounded -= block
    rounded *= rounded
    rounded *= importance
    return np.asarray(rounded.sum(axis=1), np.float32)


def stored_scales(scale: NDArray[np.floating], form: Format) -> Matrix:
    """Scales as the file will hold them: of its type, and positive."""
    return np.asarray(np.maximum(scale, SMALLEST_SCALES[form.scale]).astype(form.scale_dtype), np.float32)


def _chunks(inputs: int, outputs: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole groups that cover a matrix, each of about CHUNK_ELEMENTS."""
    columns = min(outputs, max(1, CHUNK_ELEMENTS // group))
    rows = group * max(1, CHUNK_ELEMENTS // (group * columns))
    for row in range(0, inputs, rows):
        for column in range(0, outputs, columns):
            yield slice(row, min(row + rows, inputs)), slice(column, min(column + columns, outputs))
