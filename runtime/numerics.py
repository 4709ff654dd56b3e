"""How far two arrays are apart, and how far they may be.

Errors are reported as max, mean and relative to the standard deviation of the reference, so that a figure means the same
for logits of any scale. A looser tolerance is a decision, argued in `TOLERANCES` or in the registration of a backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends import MODULES, registered
from retnet_export.runtime.errors import UserError

Computation = Literal["float32", "float16", "bfloat16", "quantized"]
EXPONENTS: Mapping[str, int] = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
"""The bits of the exponent, by NumPy's name of a type."""
CHUNK_ELEMENTS = 1 << 18
"""Elements looked at at once: what fits in a cache."""


@dataclass(frozen=True)
class Error:
    """The distance of an array from its reference.

    Attributes:
        maximum: of |a - r|.
        mean: of |a - r|.
        relative: maximum over the standard deviation of r.
    """

    maximum: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Tolerance:
    """The largest relative error of logits that is still rounding, and why."""

    relative: float
    reason: str


TOLERANCES: Mapping[str, Tolerance] = {
    "torch-float64": Tolerance(1e-10, "float64 rounding over some hundred operations a token, and as many tokens"),
    "torch-float32": Tolerance(1e-4, "float32 rounding; the parallel form sums T terms in another order than the recurrent one"),
    "onnxruntime-float32": Tolerance(1e-4, "float32 rounding, and angles quantised to 2^-32 of a turn per token"),
    "chunkwise-float32": Tolerance(2e-5, "prefill against steps: the same float32 terms of a sum in another order"),
    "state-float32": Tolerance(1e-4, "float32 rounding of every update, which decay forgets: it must not grow with the sequence"),
    "onnxruntime-float16": Tolerance(5e-2, "operands of every product rounded to 11 bits, residual and state in float32"),
    "onnxruntime-bfloat16": Tolerance(4e-1, "operands of every product rounded to 8 bits"),
    "int8-cache": Tolerance(3e-1, "keys and values of the compared Transformer rounded to 8 bits with one scale for all"),
    "onnxruntime-quantized": Tolerance(
        4e-1, "against the same integer weights: fused products round their other operand to 8 bits in blocks, layer after layer"
    ),
}
"""By what is compared: a form, or what products compute with in ONNX Runtime on the CPU, to which every other backend is held
unless its registration says otherwise."""


def tolerance(computation: Computation, backend: str = "onnxruntime") -> Tolerance:
    """How far logits may be from the reference's; every backend has an answer, also one that is not written yet.

    Args:
        computation: what the products compute with, or "quantized", against the same integer weights.
        backend: its name; one that says nothing else must do what the CPU does.
    """
    own = registered(backend).tolerances if backend in MODULES else {}
    return own.get(computation, TOLERANCES[f"onnxruntime-{computation}"])


def first_not_finite(array: NDArray[np.generic]) -> int | None:
    """The place of the first NaN or infinity in an array of floats in C order; None if there is none.

    The exponent's bits are all ones in both, so that formats of 16 bits, in which NumPy computes slowly, cost as little as others.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    name = flat.dtype.name
    if name not in EXPONENTS:
        return None
    bits, exponent = flat.view(f"u{flat.dtype.itemsize}"), EXPONENTS[name]
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        wrong = (bits[start : start + CHUNK_ELEMENTS] & exponent) == exponent
        if wrong.any():
            return start + int(wrong.argmax())
    return None


def measure(actual: NDArray[np.generic], reference: NDArray[np.generic]) -> Error:
    """Errors of `actual` against `reference`, of one shape.

    Raises:
        UserError: shapes differ, or a value is not finite.
    """
    a, r = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    if a.shape != r.shape:
        raise UserError(f"cannot compare shapes {a.shape} and {r.shape}")
    for what, values in (("result", a), ("reference", r)):
        if count := int((~np.isfinite(values)).sum()):
            raise UserError(f"the {what} holds {count:,} values of {values.size:,} that are not finite (NaN or infinity)")
    difference = np.abs(a - r)
    return Error(float(difference.max()), float(difference.mean()), float(difference.max() / spread(r)))


def spread(reference: NDArray[np.generic]) -> float:
    """What errors are measured by: the standard deviation, or where all values are one, its size, or 1 if that is 0."""
    r = np.asarray(reference, np.float64)
    return float(r.std()) or float(np.abs(r).max()) or 1.0
