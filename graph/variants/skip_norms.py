"""A residual sum and the RMSNorm after it as one operator, for a residual stream in float32.

    x ─ + ─┬─ Pow … Div ─ · weight ─ n                   x ─┬─ SkipSimplifiedLayerNormalization ─┬─ n
    y ─┘   └─ next residual                    ->        y ─┘                                    └─ next residual

Rule: both are computed in float32 as before; one node less is launched, and the stream is passed over once.
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.norms import match_rms_norm
from retnet_export.graph.variants.pattern import MICROSOFT, scope_of, substitute


class SkipNormPass(ir.passes.InPlacePass):
    """Replace norms whose input is a sum of two activations."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            norm = match_rms_norm(node)
            total = None if norm is None else norm.x.producer()
            if (
                norm is None
                or norm.weight is None
                or total is None
                or total.op_type not in ("Add", "Sum")
                or len(total.inputs) != 2
            ):
                continue
            x, y = total.inputs
            # A bias is no residual, and of another shape.
            if x is None or y is None or x.const_value is not None or y.const_value is not None:
                continue
            normed, _, _, stream = Inserter(graph, node, scope_of(node)).op_n(
                "SkipSimplifiedLayerNormalization",
                x,
                y,
                norm.weight,
                names=[f"{_leaf(total)}.normed", "", "", f"{_leaf(total)}.sum"],
                dtypes=[ir.DataType.FLOAT] * 4,
                domain=MICROSOFT,
                epsilon=norm.eps,
            )
            substitute(norm.result, normed)
            substitute(norm.x, stream)
            modified = True
        return ir.passes.PassResult(model, modified)


def _leaf(node: ir.Node) -> str:
    return (node.name or "residual").rpartition(".")[2]
