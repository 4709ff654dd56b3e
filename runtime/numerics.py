"""How far two arrays are apart, and how far they may be: the one table of tolerances.

Errors are reported as max, mean and relative to the standard deviation of the reference, so that a figure means the same
for logits of any scale. A looser tolerance is a decision, argued in `TOLERANCES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import UserError


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
    "state-float32": Tolerance(1e-4, "float32 rounding of every update, which decay forgets: it must not grow with the stream"),
    "onnxruntime-float16": Tolerance(5e-2, "operands of every product rounded to 11 bits, residual and state in float32"),
    "onnxruntime-bfloat16": Tolerance(4e-1, "operands of every product rounded to 8 bits"),
    "int8-cache": Tolerance(3e-1, "keys and values of the compared Transformer rounded to 8 bits with one scale for all"),
    "onnxruntime-quantized": Tolerance(
        4e-1, "against the same integer weights: fused products round their other operand to 8 bits in blocks, layer after layer"
    ),
    "onnxruntime-cuda-float32": Tolerance(1e-4, "float32 rounding, TF32 off; sums in another order than on the CPU"),
    "onnxruntime-cuda-float16": Tolerance(5e-2, "as on the CPU, and the residual stream and the gates rounded to 11 bits as well"),
}


def measure(actual: NDArray[np.generic], reference: NDArray[np.generic]) -> Error:
    """Errors of `actual` against `reference`, of one shape.

    Raises:
        UserError: shapes differ, or a value is not finite.
    """
    a, r = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    if a.shape != r.shape:
        raise UserError(f"cannot compare shapes {a.shape} and {r.shape}")
    if not np.isfinite(a).all():
        raise UserError(f"the result holds {int((~np.isfinite(a)).sum())} values that are not finite")
    difference = np.abs(a - r)
    return Error(float(difference.max()), float(difference.mean()), float(difference.max() / r.std()))
