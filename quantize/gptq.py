"""GPTQ: integers for a matrix such that the product on a calibration text changes least.

What it knows of the inputs is their Gram matrix XᵀX over the text: with it the error of the product is
tr((W - Ŵ)ᵀ XᵀX (W - Ŵ)), exactly, however long the text was.

Deviation from the libraries: the `gptq` of onnxruntime's copy of Neural Compressor returns rounded floats without their integers
and scales, and inside a block takes the scale of a group from weights that its own updates have not reached. The method is a page
of NumPy, so it is written out here (docs/lab/quantization.md has the comparison, and what AWQ gained: nothing).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retnet_export.quantize.formats import Format, Matrix, Quantized, least_squares_scales, nearest, round_to_nearest

Gram = NDArray[np.float64]
"""XᵀX of a matrix's inputs over the calibration text, (inputs, inputs)."""
DAMPING = 0.01
"""λ below, as a share of the mean diagonal of XᵀX."""
BLOCK = 128
"""Rows between updates of the rest."""


def gptq(weight: Matrix, form: Format, gram: Gram) -> Quantized:
    """Round a matrix input by input; later inputs compensate the error of each rounding.

    With H = XᵀX + λI and H⁻¹ = UᵀU, U upper triangular, rounding row k leaves the error e = (w_k - ŵ_k) / U[k, k], and every
    later row j takes w_j -= U[k, j] e. Updates reach the rows of the running block at once and the others once a block; a group's
    scale is chosen when its first row is reached, from weights that carry all updates so far. Rows are visited in their order: the
    file's groups are of neighbours, so the paper's reordering by activation cannot be used.

    Args:
        weight: (inputs, outputs).
        form: how to store it; integers.
        gram: of its inputs.

    Source: Frantar et al., arXiv 2210.17323.
    """
    inputs, outputs = weight.shape
    group = form.group(inputs)
    factor = _inverse_factor(gram)
    importance = np.ascontiguousarray(1.0 / np.diag(factor) ** 2, np.float32)
    by_block = group > BLOCK  # such a group ends beyond the block, so its scale is chosen before
    scales = round_to_nearest(weight, form, importance).scales if by_block else np.empty((inputs // group, outputs), np.float32)
    block = BLOCK if by_block else max(group, BLOCK // group * group)
    rest = weight.astype(np.float32, copy=True)
    values = np.empty((inputs, outputs), np.int8)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = np.empty((stop - start, outputs), np.float32)
        for row in range(start, stop):
            if not by_block and row % group == 0:
                rows = slice(row, row + group)
                scales[row // group] = least_squares_scales(rest[None, rows], form, importance[None, rows, None])[0]
            values[row] = nearest(rest[row], scales[row // group], form)
            errors[row - start] = (rest[row] - values[row] * scales[row // group]) / factor[row, row]
            rest[row + 1 : stop] -= factor[row, row + 1 : stop, None] * errors[row - start]
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return Quantized(form, values, scales)


def _inverse_factor(gram: Gram) -> NDArray[np.float32]:
    """U, upper triangular, with (XᵀX + λI)⁻¹ = UᵀU."""
    # The mean of the diagonal, or 1 if no input was ever other than 0. Nothing absolute: inputs may be of any size.
    mean_square = float(np.trace(gram)) / len(gram) or 1.0
    inverse = np.linalg.inv(gram + np.eye(len(gram)) * DAMPING * mean_square)
    return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)
