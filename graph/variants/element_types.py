"""Element types of all values, so that a rewrite can tell what was cast and what was not.

Rule: types alone are taken of ONNX's inference, since rewrites move values to other shapes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


class InferElementTypes(ir.passes.InPlacePass):
    """Give every value that has no type the one that ONNX infers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inferred = ShapeInferencePass()(ir.from_proto(ir.to_proto(model))).model.graph
        untyped = [
            (value, found.type)
            for node, same in zip(model.graph, inferred, strict=True)
            for value, found in zip(node.outputs, same.outputs, strict=True)
            if value.type is None and found.type is not None
        ]
        for value, kind in untyped:
            value.type = kind
        return ir.passes.PassResult(model, bool(untyped))
