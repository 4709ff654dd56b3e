"""Gates as one operator each: the head norm with its swish gate, and the swish of the feed-forward.

Rule: `swish(gate) · norm(o)` is `com.microsoft::GatedRMSNorm` over groups of Dv, and `swish(x)` is `com.microsoft::QuickGelu`
with α = 1. Both take and give the format of the products where their inputs had it, and calculate in float32 inside.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.states import layout_of, states
from retnet_export.graph.variants.norms import in_type, match_rms_norm
from retnet_export.graph.variants.pattern import (
    MICROSOFT,
    inputs_of,
    narrowed,
    number,
    only_user,
    scope_of,
    size_of,
    substitute,
)


def swish_input(value: ir.Value) -> ir.Value | None:
    """x of Mul(x, Sigmoid(x))."""
    factors = inputs_of(value, "Mul")
    inner = inputs_of(factors[1], "Sigmoid") if factors else None
    return factors[0] if factors and inner and inner[0] is factors[0] else None


class GatedNormPass(ir.passes.InPlacePass):
    """Mul(swish(gate), Reshape(norm(o))) -> GatedRMSNorm(o, weight, gate).

    A constant factor on o goes into the norm's epsilon: norm(c·o) with eps is norm(o) with eps/c².
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            norm = match_rms_norm(node)
            joined = None if norm is None else only_user(norm.result, "Reshape")
            product = None if joined is None else only_user(joined.outputs[0], "Mul")
            gate = None if product is None or product.inputs[0] is None else swish_input(product.inputs[0])
            if norm is None or joined is None or product is None or gate is None:
                continue
            scaled = inputs_of(norm.x, "Mul")
            factor = number(scaled[1]) if scaled else None
            o, eps = (norm.x, norm.eps) if scaled is None or factor is None else (scaled[0], norm.eps / factor**2)
            casts = [narrowed(each) for each in (o, gate)]
            dtype = ir.DataType.FLOAT
            if casts[0] is not None and casts[1] is not None and casts[0][1] == casts[1][1]:
                o, dtype = casts[0]
                gate = casts[1][0]
            w = Inserter(graph, product, scope_of(product))
            weight = norm.weight or w.initializer(np.ones(_value_dim(model), np.float32), "ones_of_head")
            if weight.shape is None or len(weight.shape) != 1:  # a scale per head
                continue
            o = w.op("Reshape", o, joined.inputs[1], name="o_joined", dtype=dtype)
            gate = w.op("Reshape", gate, joined.inputs[1], name="gate_joined", dtype=dtype)
            gated = w.op(
                "GatedRMSNorm",
                o,
                in_type(w, weight, dtype),
                gate,
                name="gated_norm",
                dtype=dtype,
                domain=MICROSOFT,
                activation="silu",
                epsilon=eps,
            )
            substitute(
                product.outputs[0], gated if dtype == ir.DataType.FLOAT else w.cast(gated, ir.DataType.FLOAT, "gated_float32")
            )
            modified = True
        return ir.passes.PassResult(model, modified)


class SwishPass(ir.passes.InPlacePass):
    """Cast(Mul(swish(Cast(gate)), Cast(up))) -> Mul(QuickGelu(gate), up)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            factors = inputs_of(node.inputs[0], "Mul") if node.op_type == "Cast" else None
            wide = swish_input(factors[0]) if factors else None
            gate, up = (None, None) if factors is None or wide is None else (narrowed(wide), narrowed(factors[1]))
            if gate is None or up is None or not gate[1] == up[1] == node.outputs[0].dtype:
                continue
            w = Inserter(graph, node, scope_of(node))
            act = w.op("QuickGelu", gate[0], name="act_narrow", dtype=gate[1], domain=MICROSOFT, alpha=1.0)
            substitute(node.outputs[0], w.op("Mul", act, up[0], name="gated_narrow", dtype=gate[1]))
            modified = True
        return ir.passes.PassResult(model, modified)


def _value_dim(model: ir.Model) -> int:
    """Dv, from the state as the graph keeps it; it is never cut in pieces."""
    return size_of(states(model.graph)[0][0], layout_of(model).axes.index("value"))
