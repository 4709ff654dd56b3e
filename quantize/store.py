"""Quantized matrices on their way into the new bundle's weights file, each written once and at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.weights_file import WeightsFile, pack_int4
from retnet_export.quantize.formats import Format, Quantized
from retnet_export.quantize.options import Role
from retnet_export.quantize.rewrite import StoredMatrix


class MatrixStore:
    """Writes quantized matrices and remembers where they are.

    Args:
        file: the new bundle's weights file.
    """

    def __init__(self, file: WeightsFile) -> None:
        self._file = file
        self._stored: dict[str, StoredMatrix] = {}

    @property
    def stored(self) -> Mapping[str, StoredMatrix]:
        """By the initializer's name in the float graph."""
        return self._stored

    def put(self, name: str, role: Role, quantized: Quantized) -> None:
        """Write one matrix (inputs, outputs); of an embedding (D, V), a row of the table being an output."""
        form = quantized.format
        scales = quantized.scales.astype(form.scale_dtype)
        if role in ("weights", "head"):
            values = self._file.tensor(f"{name}.{form.name}", lambda: quantized.values.astype(form.dtype))
            blocked = form.group_size is not None
            self._stored[name] = StoredMatrix(
                form, values, self._file.tensor(f"{name}.scale", lambda: scales if blocked else scales[0])
            )
            return
        rows, width = quantized.values.shape[1], quantized.values.shape[0]
        word_shape = (rows, width * form.bits // 32, 1)
        scale_shape = (rows, 1) if form.group_size is None else (rows, scales.shape[0], 1)
        if role == "embedding":
            words = self._file.tensor(f"{name}.{form.name}_words", lambda: _words(quantized.values.T, form).reshape(word_shape))
            row_scales = self._file.tensor(f"{name}.row_scale", lambda: scales.T.reshape(scale_shape))
            self._stored[name] = StoredMatrix(form, words=words, row_scales=row_scales)
            return
        values = self._file.tensor(f"{name}.{form.name}", lambda: quantized.values.T)
        shared = self._file.tensor(f"{name}.scale", lambda: scales[0])
        self._stored[name] = StoredMatrix(
            form,
            values,
            shared,
            self._file.view(f"{name}.{form.name}_words", values, ir.DataType.INT32, word_shape),
            self._file.view(f"{name}.row_scale", shared, shared.dtype, scale_shape),
        )


def _words(rows: NDArray[np.int8], form: Format) -> NDArray[np.int32]:
    """Rows of integers as little-endian words of 32 bits, the first integer lowest."""
    contiguous = np.ascontiguousarray(rows)
    return (pack_int4(contiguous) if form.bits == 4 else contiguous.reshape(-1)).view("<i4")
