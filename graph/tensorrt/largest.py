"""No weight of a product is larger than a limit: for devices on which one large allocation fails though enough memory is free.

Rule: a matrix W (K, N) above the limit becomes pieces of its outputs, and their products stand side by side. Every number is
computed as before; the price is a kernel a piece, and one that puts the results together.

    before   x ─ MatMul ── y (…, N)                    after    x ┬ MatMul(W₁ (K, N₁)) ┬ Concat ── y (…, N)
             W ──┘                                                └ MatMul(W₂ (K, N₂)) ┘

The table that a Gather reads, the embedding, stays one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, made_by, scope_of, substitute
from retnet_export.graph.weights_file import WeightsFile

GRAIN = 128
"""Outputs of a piece are a multiple of this, so that kernels find the sizes that they are made for."""


class LargestWeightPass(ir.passes.InPlacePass):
    """Cut products with large weights.

    Args:
        file: takes the pieces; a second graph that multiplies by the same matrix refers to the same bytes.
        largest: bytes of a weight, at most (unless 128 outputs have more).
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
        y = node.outputs[0]
        pieces = []
        for number, (first, end) in enumerate(bounds, 1):
            name = f"{short}.piece{number}"
            weight = self._slice(graph, found.values, found.outputs_axis, first, end)
            if found.dequantize is not None:
                others = [
                    self._slice(graph, each, found.scales_axis(each), first, end) for each in found.dequantize.inputs[1:] if each
                ]
                attributes = {key: value.value for key, value in found.dequantize.attributes.items()}
                weight = w.op("DequantizeLinear", weight, *others, name=f"{name}.weight", dtype=y.dtype, **attributes)
            if found.turned:
                weight = w.op("Transpose", weight, name=f"{name}.turned", dtype=y.dtype, perm=[1, 0])
            pieces.append(w.op("MatMul", node.inputs[0], weight, name=name, dtype=y.dtype))
        substitute(y, w.op("Concat", *pieces, name=f"{short}.pieces", dtype=y.dtype, axis=-1))

    def _slice(self, graph: ir.Graph, value: ir.Value, axis: int, first: int, end: int) -> ir.Value:
        name = f"{value.name}.{first}_{end}"
        if name not in graph.initializers:

            def make() -> NDArray[np.generic]:
                whole = constant(value)
                assert whole is not None
                return np.ascontiguousarray(whole[first:end] if axis == 0 else whole[:, first:end])

            tensor = self._file.tensor(name, make)
            graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            )
        return graph.initializers[name]


@dataclass(frozen=True)
class _Product:
    """A product with a constant matrix.

    Attributes:
        values: (K, N), or (N, K) if it is `turned` before the product.
        dequantize: the node that makes floats of the values, if they are integers.
        turned: whether a Transpose stands behind them.
    """

    values: ir.Value
    dequantize: ir.Node | None
    turned: bool

    @property
    def outputs_axis(self) -> int:
        return 0 if self.turned else 1

    @property
    def bytes(self) -> int:
        tensor = self.values.const_value
        return 0 if tensor is None else tensor.nbytes

    def scales_axis(self, scales: ir.Value) -> int:
        """Which axis of scales or zero points is that of the outputs: the only one, or that of the values."""
        return 0 if scales.shape is None or len(scales.shape) == 1 else self.outputs_axis

    def bounds(self, largest: int) -> list[tuple[int, int]]:
        """First and last output of each piece: as few as hold the limit, of about the same size."""
        assert self.values.shape is not None
        count = int(self.values.shape.numpy()[self.outputs_axis])
        pieces = min(-(-self.bytes // largest), -(-count // GRAIN))
        each = -(-count // pieces // GRAIN) * GRAIN
        return [(first, min(first + each, count)) for first in range(0, count, each)]


def _match(node: ir.Node) -> _Product | None:
    if node.op_type != "MatMul" or node.domain != "":
        return None
    turned = made_by(node.inputs[1], "Transpose")
    weight = node.inputs[1] if turned is None else turned.inputs[0]
    dequantize = made_by(weight, "DequantizeLinear")
    values = weight if dequantize is None else dequantize.inputs[0]
    if values is None or values.const_value is None or values.shape is None or len(values.shape) != 2:
        return None
    if dequantize is not None and any(
        each is None or each.const_value is None or each.const_value.size == 1 for each in dequantize.inputs[1:]
    ):
        return None  # one scale for all has no outputs to be cut by
    return _Product(values, dequantize, turned is not None)
