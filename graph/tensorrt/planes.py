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

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, made_by, narrowed, only_user, scope_of, substitute
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
            found = _match(node)
            if found is None:
                continue
            if not found.fits:
                self.left.append(found.name)
                continue
            self._replace(graph, node, found)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _replace(self, graph: ir.Graph, node: ir.Node, found: _Int8Product) -> None:
        w = Inserter(graph, node, scope_of(node))
        name = (node.name or "product").rpartition(".")[2]
        planes = self._initializer(graph, found.name, ".planes", found.planes)
        scales = self._initializer(graph, found.name, ".plane_scales", found.plane_scales)
        dtype = found.scale.dtype
        assert dtype is not None
        weight = w.op("DequantizeLinear", planes, scales, name=f"{name}.planes", dtype=dtype, axis=0, block_size=found.block)
        both = w.op("MatMul", node.inputs[0], weight, name=f"{name}.both", dtype=dtype)
        y = node.outputs[0]
        up = only_user(y, "Cast")
        if up is not None and narrowed(up.outputs[0]) is not None:
            # Halves are added in float32, as everything outside the products is.
            y, both = up.outputs[0], w.cast(both, ir.DataType.FLOAT, f"{name}.both_float32")
        assert both.dtype is not None
        high, low = w.op_n("Split", both, names=[f"{name}.high", f"{name}.low"], dtypes=[both.dtype] * 2, axis=-1, num_outputs=2)
        substitute(y, w.op("Add", high, low, name=f"{name}.whole", dtype=both.dtype))

    def _initializer(self, graph: ir.Graph, name: str, role: str, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
        full = f"{name}{role}"
        if full not in graph.initializers:
            tensor = self._file.tensor(full, make)
            value = ir.Value(name=full, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            graph.register_initializer(value)
        return graph.initializers[full]


@dataclass(frozen=True)
class _Int8Product:
    """A product with an INT8 weight.

    Attributes:
        values: integers (K, N), or (N, K) if `by_output`.
        scale: one for each output, (N,).
        by_output: whether a row of `values` is an output: the tied head.
    """

    values: ir.Value
    scale: ir.Value
    by_output: bool

    @property
    def name(self) -> str:
        assert self.values.name is not None
        return self.values.name

    @property
    def block(self) -> int:
        inputs = self._matrix().shape[0]
        return next((block for block in BLOCKS if inputs % block == 0), 0)

    @property
    def fits(self) -> bool:
        """Whether two planes hold it exactly."""
        return bool(self.block) and int(self._matrix().max()) <= LARGEST

    def _matrix(self) -> NDArray[np.int8]:
        values = np.asarray(constant(self.values), np.int8)
        return values.T if self.by_output else values

    def planes(self) -> NDArray[np.generic]:
        """(K, 2N), four-bit: h beside l."""
        return np.asarray(split(self._matrix()), ml_dtypes.int4)

    def plane_scales(self) -> NDArray[np.generic]:
        """(K / block, 2N)."""
        scale = constant(self.scale)
        assert scale is not None
        both = np.concatenate([scale * scale.dtype.type(16), scale])
        return np.repeat(both[None], self._matrix().shape[0] // self.block, axis=0)


def split(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """(K, N) -> (K, 2N): h, then l, with w = 16 h + l and l in -8…7."""
    low = ((weight.astype(np.int16) + 8) & 15) - 8
    return np.concatenate([(weight - low) >> 4, low], axis=1).astype(np.int8)


def _match(node: ir.Node) -> _Int8Product | None:
    """A MatMul by an INT8 constant with one scale for each output, symmetric, whose other operand is not quantized."""
    if node.op_type != "MatMul" or node.domain != "" or made_by(node.inputs[0], "DequantizeLinear") is not None:
        return None
    turned = made_by(node.inputs[1], "Transpose")
    dequantize = made_by(node.inputs[1] if turned is None else turned.inputs[0], "DequantizeLinear")
    if dequantize is None:
        return None
    values, scale, *zero_point = dequantize.inputs
    zeros = constant(zero_point[0]) if zero_point else np.zeros(1)
    if values is None or scale is None or values.dtype != ir.DataType.INT8 or constant(values) is None or scale.shape is None:
        return None
    if zeros is None or zeros.any() or len(scale.shape) != 1:
        return None
    if dequantize.attributes.get_int("axis", 1) != (1 if turned is None else 0):
        return None
    return _Int8Product(values, scale, by_output=turned is not None)
