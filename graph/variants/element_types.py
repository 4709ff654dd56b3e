"""Element types of all values, so that a rewrite can tell what was cast and what was not.

Rule: the graphs are written without types in between, and their operators are few; the type follows from the operator.
"""

from __future__ import annotations

import onnx_ir as ir

COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not"})
TYPE_FROM_SECOND_INPUT = frozenset({"Where", "DequantizeLinear"})


class InferElementTypes(ir.passes.InPlacePass):
    """Give every value that has no type the one its operator gives it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            inferred = _output_type(node)
            for value in node.outputs:
                if value.type is None and inferred is not None:
                    value.type = ir.TensorType(inferred)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _output_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Shape", "NonZero", "ArgMax"):
        return ir.DataType.INT64
    if node.op_type in COMPARISONS:
        return ir.DataType.BOOL
    if not node.inputs:
        return None
    # QuantizeLinear gives the type of its zero point, and is always written with one.
    place = 2 if node.op_type == "QuantizeLinear" else 1 if node.op_type in TYPE_FROM_SECOND_INPUT else 0
    source = node.inputs[place]
    return None if source is None else source.dtype
