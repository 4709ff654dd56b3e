"""How integers are chosen for a matrix: round to nearest, GPTQ, AWQ. One small interface over plain matrices.

What a calibrated method knows of a matrix's inputs is their Gram matrix, X ᵀX over the calibration text: with it the error of
the product is tr((W - Ŵ)ᵀ XᵀX (W - Ŵ)), exactly, however long the text was.

Deviation from the libraries: onnxruntime's copy of Neural Compressor has a `gptq` on plain matrices, but it returns rounded
floats without their integers and scales, and inside a block takes the scale of a group from weights that its own updates
have not reached; nvidia-modelopt's ONNX path keeps weights as floats, in a file for each graph. Both
methods are a page of NumPy, so they are written out here (docs/lab/quantization.md has the comparison).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.quantize.formats import Format, Matrix, Quantized, least_squares_scales, nearest, round_to_nearest

Gram = NDArray[np.float64]
"""XᵀX of a matrix's inputs over the calibration text, (inputs, inputs)."""

UNUSED = 1e-12
"""The share of the mean square below which an input counts as this much: it is never used."""


class Method(Protocol):
    """Chooses integers for one matrix at a time."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs the inputs' Gram matrix."""

    def input_scales(self, weight: Matrix, form: Format, gram: Gram) -> NDArray[np.float32] | None:
        """Factors (inputs,) by which to multiply the rows of `weight` and divide its inputs; None: leave both as they are."""

    def quantize(self, weight: Matrix, form: Format, gram: Gram | None) -> Quantized:
        """Integers and scales of one matrix (inputs, outputs); `gram` is None where nothing is known of its inputs."""


class RoundToNearest:
    """Each weight by itself; the scale with the least squared error of the weights."""

    calibrated = False

    def input_scales(self, weight: Matrix, form: Format, gram: Gram) -> NDArray[np.float32] | None:
        return None

    def quantize(self, weight: Matrix, form: Format, gram: Gram | None) -> Quantized:
        return round_to_nearest(weight, form)


class Gptq:
    """GPTQ (Frantar et al., arXiv 2210.17323): input by input, later inputs compensate the error of each rounding.

    With H = XᵀX + λI and H⁻¹ = UᵀU, U upper triangular, rounding row k leaves the error e = (w_k - ŵ_k) / U[k, k], and every
    later row j takes w_j -= U[k, j] e. Updates reach the rows of the running block at once and the others once a block, as in
    the paper; a group's scale is chosen when its first row is reached, from weights that carry all updates so far. Rows are
    visited in their order: the file's groups are of neighbours, so the paper's reordering by activation is of no use.

    Args:
        damping: λ as a share of the mean diagonal of XᵀX.
        block: rows between updates of the rest.
    """

    calibrated = True

    def __init__(self, damping: float = 0.01, block: int = 128) -> None:
        self.damping, self.block = damping, block

    def input_scales(self, weight: Matrix, form: Format, gram: Gram) -> NDArray[np.float32] | None:
        return None

    def quantize(self, weight: Matrix, form: Format, gram: Gram | None) -> Quantized:
        if gram is None:
            return round_to_nearest(weight, form)
        inputs = weight.shape[0]
        group = form.group(inputs)
        factor = self._inverse_factor(gram)
        importance = np.ascontiguousarray(1.0 / np.diag(factor) ** 2, np.float32)
        if group > self.block:
            return self._with_scales(weight, form, factor, round_to_nearest(weight, form, importance).scales)
        return self._with_scales(weight, form, factor, None, importance)

    def _inverse_factor(self, gram: Gram) -> NDArray[np.float32]:
        """U, upper triangular, with (XᵀX + λI)⁻¹ = UᵀU."""
        damped = gram + np.eye(len(gram)) * self.damping * _mean_square(gram)
        inverse = np.linalg.inv(damped)
        return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)

    def _with_scales(
        self,
        weight: Matrix,
        form: Format,
        factor: NDArray[np.float32],
        fixed: Matrix | None,
        importance: NDArray[np.float32] | None = None,
    ) -> Quantized:
        inputs, outputs = weight.shape
        group = form.group(inputs)
        block = self.block if fixed is not None else max(group, self.block // group * group)
        rest = weight.astype(np.float32, copy=True)
        values = np.empty((inputs, outputs), np.int8)
        scales = np.empty((inputs // group, outputs), np.float32) if fixed is None else fixed
        for start in range(0, inputs, block):
            stop = min(start + block, inputs)
            errors = np.empty((stop - start, outputs), np.float32)
            for row in range(start, stop):
                if fixed is None and row % group == 0:
                    assert importance is not None
                    rows = slice(row, row + group)
                    scales[row // group] = least_squares_scales(rest[None, rows], form, importance[None, rows, None])[0]
                values[row] = nearest(rest[row], scales[row // group], form)
                errors[row - start] = (rest[row] - values[row] * scales[row // group]) / factor[row, row]
                rest[row + 1 : stop] -= factor[row, row + 1 : stop, None] * errors[row - start]
            rest[stop:] -= factor[start:stop, stop:].T @ errors
        return Quantized(form, values, scales)


class Awq:
    """AWQ (Lin et al., arXiv 2306.00978): large inputs are scaled up in the weight and down in the norm before.

    The factors are s = (root mean square of the input)^α, α searched for the least error of the product, as in the paper. Where no
    norm or linear layer stands before a matrix to take the division, only the scales are chosen by what its inputs carry.

    Args:
        steps: values of α tried between 0 and 1.
    """

    calibrated = True

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps

    def input_scales(self, weight: Matrix, form: Format, gram: Gram) -> NDArray[np.float32] | None:
        size = np.sqrt(np.maximum(np.diag(gram) / _mean_square(gram), UNUSED))
        best, least = None, np.inf
        for alpha in np.linspace(0.0, 1.0, self.steps + 1):
            scales = size**alpha
            scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
            folded = self.quantize(weight * scales[:, None], form, gram / np.outer(scales, scales))
            error = product_error(weight, folded.dequantized() / scales[:, None], gram)
            if error < least:
                best, least = scales, error
        return best

    def quantize(self, weight: Matrix, form: Format, gram: Gram | None) -> Quantized:
        importance = None if gram is None else (np.diag(gram) / _mean_square(gram)).astype(np.float32)
        return round_to_nearest(weight, form, importance)


def _mean_square(gram: Gram) -> float:
    """The mean of the diagonal of XᵀX; 1 if no input was ever other than 0. Nothing absolute: inputs may be of any size."""
    return float(np.trace(gram)) / len(gram) or 1.0


def product_error(weight: Matrix, approximation: Matrix, gram: Gram) -> float:
    """Σ|XW - XŴ|² over the calibration text."""
    difference = (weight - approximation).astype(np.float64)
    return float(np.einsum("kn,kn->", difference, gram @ difference))


METHODS: Mapping[str, type[RoundToNearest] | type[Gptq] | type[Awq]] = {"rtn": RoundToNearest, "gptq": Gptq, "awq": Awq}
"""By the name on the command line."""
