"""No weight of a product is larger than a limit: for devices on which one large allocation fails though enough memory is free.

Rule: a matrix W (K, N) above the limit becomes pieces of its inputs, whose products are added in float32. A piece is a part of the
weights file, so nothing is copied, and the addition is part of the product's kernel. Pieces of outputs would not do: TensorRT puts
products that read the same x back together (docs/lab/tensorrt.md).

    before   x ─ MatMul ─ Cast ── y (…, N)             after    x ─ Split ┬ MatMul(W₁ (K₁, N)) ─ Cast ┬ Add ── y (…, N)
             W ──┘                                                        └ MatMul(W₂ (K₂, N)) ─ Cast ┘

A product whose input is quantized too is left alone: TensorRT has an 8-bit product for that pair. So is the table that a Gather
reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, made_by, narrowed, only_user, scope_of, substitute
from retnet_export.graph.weights_file import WeightsFile

GRAIN = 128
"""Inputs of a piece are a multiple of this, so that kernels find the sizes that they are made for."""


class LargestWeightPass(ir.passes.InPlacePass):
    """Cut products with large weights.

    Args:
        file: takes pieces that are no part of the weights file; a second graph with the same matrix refers to the same bytes.
        largest: bytes of a weight, at most (unless 128 inputs have more).
    """

    def __init__(self, file: WeightsFile, largest: int) -> None:
        super().__init__()
        self._file, self._largest = file, largest

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            found = _match(node)
            if found is None or found.bytes <= self._largest:
                continue
            bounds = found.bounds(self._largest)
            if len(bounds) > 1:
                self._replace(graph, node, found, bounds)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _replace(self, graph: ir.Graph, node: ir.Node, found: _Product, bounds: list[tuple[int, int]]) -> None:
        w, short = Inserter(graph, node, scope_of(node)), (node.name or "product").rpartition(".")[2]
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        assert y.dtype is not None
        sizes = w.initializer(np.array([end - first for first, end in bounds], np.int64), f"{w.scope}.{short}.sizes")
        names = [f"{short}.inputs{number}" for number in range(1, 1 + len(bounds))]
        parts = w.op_n("Split", x, sizes, names=names, dtypes=[x.dtype] * len(bounds), axis=-1)
        whole: ir.Value | None = None
        for number, (part, (first, end)) in enumerate(zip(parts, bounds, strict=True), 1):
            name = f"{short}.piece{number}"
            product = w.op("MatMul", part, self._weight(graph, w, found, name, first, end), name=name, dtype=y.dtype)
            product = w.cast(product, ir.DataType.FLOAT, f"{name}.float32")
            whole = product if whole is None else w.op("Add", whole, product, name=f"{name}.sum", dtype=ir.DataType.FLOAT)
        assert whole is not None
        up = only_user(y, "Cast")
        if up is not None and narrowed(up.outputs[0]) is not None:
            substitute(up.outputs[0], whole)
        else:
            substitute(y, whole if y.dtype == ir.DataType.FLOAT else w.cast(whole, y.dtype, f"{short}.narrowed"))

    def _weight(self, graph: ir.Graph, w: Inserter, found: _Product, name: str, first: int, end: int) -> ir.Value:
        """Inputs first … end of a matrix, (end - first, N)."""
        weight, axis = found.values, 1 if found.turned else 0
        dtype = found.values.dtype
        weight = self._slice(graph, found.values, axis, first, end)
        if found.dequantize is not None:
            dtype = found.dequantize.outputs[0].dtype
            scales = [each for each in found.dequantize.inputs[1:] if each is not None]
            if found.block:
                scales = [self._slice(graph, each, 0, first // found.block, end // found.block) for each in scales]
            attributes = {key: value.value for key, value in found.dequantize.attributes.items()}
            weight = w.op("DequantizeLinear", weight, *scales, name=f"{name}.weight", dtype=dtype, **attributes)
        return w.op("Transpose", weight, name=f"{name}.turned", dtype=dtype, perm=[1, 0]) if found.turned else weight

    def _slice(self, graph: ir.Graph, value: ir.Value, axis: int, first: int, end: int) -> ir.Value:
        name = f"{value.name}.{first}_{end}"
        if name not in graph.initializers:
            tensor = self._part(value.const_value, name, first, end) if axis == 0 else None
            if tensor is None:

                def make() -> NDArray[np.generic]:
                    whole = constant(value)
                    assert whole is not None
                    return np.ascontiguousarray(whole[first:end] if axis == 0 else whole[:, first:end])

                tensor = self._file.tensor(name, make)
            kind = ir.TensorType(tensor.dtype)
            graph.register_initializer(ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor))
        return graph.initializers[name]

    @staticmethod
    def _part(tensor: ir.TensorProtocol | None, name: str, first: int, end: int) -> ir.ExternalTensor | None:
        """Rows first … end of a tensor, where it is; None if they do not begin and end with a byte of a file."""
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        rows, columns = tensor.shape.numpy()
        bits = 8 * tensor.nbytes // (rows * columns) * columns
        if tensor.nbytes * 8 != bits * rows or bits % 8:
            return None
        offset, length = (tensor.offset or 0) + first * bits // 8, (end - first) * bits // 8
        shape = ir.Shape([end - first, columns])
        return ir.ExternalTensor(tensor.location, offset, length, tensor.dtype, shape=shape, name=name, base_dir=tensor.base_dir)


@dataclass(frozen=True)
class _Product:
    """A product with a constant matrix.

    Attributes:
        values: (K, N), or (N, K) if it is `turned` before the product.
        dequantize: the node that makes floats of the values, if they are integers.
        block: inputs that share a scale; 0 if all of an output do.
        turned: whether a Transpose stands behind them.
    """

    values: ir.Value
    dequantize: ir.Node | None
    block: int
    turned: bool

    @property
    def bytes(self) -> int:
        tensor = self.values.const_value
        return 0 if tensor is None else tensor.nbytes

    def bounds(self, largest: int) -> list[tuple[int, int]]:
        """First and last input of each piece: as few as hold the limit, of about the same size."""
        assert self.values.shape is not None
        count, grain = int(self.values.shape.numpy()[1 if self.turned else 0]), math.lcm(GRAIN, self.block or 1)
        pieces = min(-(-self.bytes // largest), -(-count // grain))
        each = -(-count // pieces // grain) * grain
        return [(first, min(first + each, count)) for first in range(0, count, each)]


def _match(node: ir.Node) -> _Product | None:
    if node.op_type != "MatMul" or node.domain != "" or made_by(node.inputs[0], "DequantizeLinear") is not None:
        return None
    turned = made_by(node.inputs[1], "Transpose")
    weight = node.inputs[1] if turned is None else turned.inputs[0]
    dequantize = made_by(weight, "DequantizeLinear")
    values = weight if dequantize is None else dequantize.inputs[0]
    if values is None or values.const_value is None or values.shape is None or len(values.shape) != 2:
        return None
    if dequantize is None:
        return _Product(values, None, 0, turned is not None)
    scales = [each for each in dequantize.inputs[1:] if each is not None and each.shape is not None]
    block = dequantize.attributes.get_int("block_size", 0)
    if block and (turned is not None or dequantize.attributes.get_int("axis", 1) != 0):
        return None
    if not block and any(len(each.shape) > 1 for each in scales if each.shape is not None):
        return None
    return _Product(values, dequantize, block, turned is not None)
