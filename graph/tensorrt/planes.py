"""Eight-bit weights as two four-bit planes, which TensorRT multiplies by without ever writing them as floats.

Rule: w = 16 h + l with h and l in -8…7, so every integer from -136 to 119 is held exactly; `quantize` rounds INT8 weights into
-128…119. TensorRT fuses a blocked INT4 DequantizeLinear into the product that reads it, and fuses no INT8 one: that is written out
as a float matrix at every step, two and a half times the bytes of an fp16 engine. Both planes stand in one constant, so that one
kernel reads x once:

    before   x ───────────────────────────────────────── MatMul ── y (…, N)
             W int8 (K, N) ─ DequantizeLinear(scale (N)) ─┘

    after    x ──────────────────────────────────────────────── MatMul ─ Split ─ Add ── y (…, N)
             [h | l] int4 (K, 2N) ─ DequantizeLinear(            ┘
                                     [16 s | s] (K/block, 2N))

A product whose input is quantized too is left alone: TensorRT has an 8-bit product for that pair. So is a matrix with a weight
above 119, or with inputs that no block divides.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import Int8Product, constant, int8_product, narrowed, only_user, scope_of, substitute
from retnet_export.graph.weights_file import WeightsFile

BLOCKS = (128, 64)
"""Inputs that share a scale, by preference: TensorRT documents these two for INT4."""

LARGEST = 119
"""16 · 7 + 7: the largest weight that two planes hold."""


class Int8AsPlanesPass(ir.passes.InPlacePass):
    """Replace products with INT8 weights.

    Args:
        file: takes the planes; a second graph that multiplies by the same matrix refers to the same bytes.
    """

    def __init__(self, file: WeightsFile) -> None:
        super().__init__()
        self._file = file
        self.left: list[str] = []
        """Names of INT8 matrices that stay as they are, and are read as floats at every step."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            found = int8_product(node)
            values = None if found is None else constant(found.values)
            if found is None or values is None:
                continue
            assert found.values.name is not None
            weight = np.asarray(values.T if found.by_output else values, np.int8)  # (K, N)
            block = next((block for block in BLOCKS if len(weight) % block == 0), None)
            if block is None or int(weight.max()) > LARGEST:
                self.left.append(found.values.name)
                continue
            self._replace(Inserter(graph, node, scope_of(node)), node, found, weight, block)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _replace(self, w: Inserter, node: ir.Node, found: Int8Product, weight: NDArray[np.int8], block: int) -> None:
        name, dtype = (node.name or "product").rpartition(".")[2], found.scale.dtype
        assert dtype is not None
        planes = self._file.tensor(f"{found.values.name}.planes", lambda: np.asarray(split(weight), ml_dtypes.int4))
        scales = self._file.tensor(f"{found.values.name}.plane_scales", lambda: _plane_scales(found.scale, len(weight) // block))
        matrix = w.op(
            "DequantizeLinear", w.tensor(planes), w.tensor(scales), name=f"{name}.planes", dtype=dtype, axis=0, block_size=block
        )
        both = w.op("MatMul", found.x, matrix, name=f"{name}.both", dtype=dtype)
        y = node.outputs[0]
        up = only_user(y, "Cast")
        if up is not None and narrowed(up.outputs[0]) is not None:
            # Halves are added in float32, as everything outside the products is.
            y, both = up.outputs[0], w.cast(both, ir.DataType.FLOAT, f"{name}.both_float32")
        assert both.dtype is not None
        high, low = w.op_n("Split", both, names=[f"{name}.high", f"{name}.low"], dtypes=[both.dtype] * 2, axis=-1, num_outputs=2)
        substitute(y, w.op("Add", high, low, name=f"{name}.whole", dtype=both.dtype))


def _plane_scales(scale: ir.Value, blocks: int) -> NDArray[np.generic]:
    """The scales of h beside those of l, (blocks, 2N)."""
    low = constant(scale)
    assert low is not None
    return np.repeat(np.concatenate([low * low.dtype.type(16), low])[None], blocks, axis=0)


def split(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """(K, N) -> (K, 2N): h, then l, with w = 16 h + l and l in -8…7."""
    low = ((weight.astype(np.int16) + 8) & 15) - 8
    return np.concatenate([(weight - low) >> 4, low], axis=1).astype(np.int8)
