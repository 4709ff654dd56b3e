"""RMSNorm as the graphs spell it, for rewrites that replace it; and a scale of ones for norms that have none.

Rule: ONNX Runtime makes one operator of a norm's five nodes and the scale after them, a vector. A norm without it, or with
one for each head, stays five nodes. The product with ones costs nothing: it disappears in that operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, inputs_of, made_by, number, only_user, scope_of


@dataclass(frozen=True)
class RmsNorm:
    """x / √(mean x² + eps) · weight over the last axis.

    Attributes:
        x: what is normalised.
        weight: the learnt scale (size,), or None.
        eps: the epsilon.
        result: the normalised value.
    """

    x: ir.Value
    weight: ir.Value | None
    eps: float
    result: ir.Value


def match_rms_norm(divide: ir.Node) -> RmsNorm | None:
    """The norm whose Div this is."""
    if divide.op_type != "Div":
        return None
    x, root = divide.inputs
    inside = inputs_of(root, "Sqrt")
    total = inputs_of(inside[0], "Add") if inside else None
    mean = inputs_of(total[0], "ReduceMean") if total else None
    square = inputs_of(mean[0], "Pow") if mean else None
    eps = number(total[1]) if total else None
    if square is None or square[0] is not x or eps is None or x is None:
        return None
    result, weight = divide.outputs[0], None
    scale = only_user(result, "Mul")
    if scale is not None and scale.inputs[1] is not None and scale.inputs[1].const_value is not None:
        result, weight = scale.outputs[0], scale.inputs[1]
    return RmsNorm(x, weight, eps, result)


class UnitScalePass(ir.passes.InPlacePass):
    """Give norms of heads that are not scaled by a vector a scale of ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            norm = match_rms_norm(node)
            reshape = None if norm is None else made_by(norm.x, "Reshape")
            shape = None if reshape is None else constant(reshape.inputs[1])
            if norm is None or shape is None or (norm.weight is not None and len(norm.weight.shape or ()) == 1):
                continue
            after = list(graph)[list(graph).index(node) + 1]
            w = Inserter(graph, after, scope_of(node))
            ones = w.initializer(np.ones(int(shape[-1]), np.float32), f"ones_{shape[-1]}")
            normed = node.outputs[0]
            scaled = w.op("Mul", normed, ones, name="unit_scaled", dtype=ir.DataType.FLOAT)
            product = scaled.producer()
            assert product is not None
            normed.replace_all_uses_with(scaled)
            product.replace_input_with(0, normed)
            modified = True
        return ir.passes.PassResult(model, modified)
