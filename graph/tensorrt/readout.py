"""The read-out of the state as Mul and ReduceSum.

Rule: a MatMul that reads the state wants it transposed, so TensorRT writes a second copy of it and reads that. As a sum over Dk the
read-out stands in the kernel that updates the state, which then passes through memory twice: read once, written once.

    before   q (B, H, Dk) ─ Unsqueeze(2) ─ MatMul ─ Squeeze(2) ─ o (B, H, Dv)
             state (B, H, Dk, Dv) ─────────┘

    after    q (B, H, Dk) ─ Unsqueeze(3) ─ Mul ─ ReduceSum(2) ─ o (B, H, Dv)
             state (B, H, Dk, Dv) ─────────┘
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, inputs_of, only_user, scope_of, substitute


class ReadOutAsSumPass(ir.passes.InPlacePass):
    """Replace the decode graph's products of one row with the state; prefill's, of many rows, stay products."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            q, squeeze = _row(node), only_user(node.outputs[0], "Squeeze") if node.outputs else None
            if q is None or squeeze is None:
                continue
            state = node.inputs[1]
            w = Inserter(graph, squeeze, scope_of(node))
            three, two = (w.initializer(np.array([axis], np.int64), f"axis_{axis}") for axis in (3, 2))
            column = w.op("Unsqueeze", q, three, name="q_column", dtype=ir.DataType.FLOAT)  # (B, H, Dk, 1)
            product = w.op("Mul", column, state, name="read_rows", dtype=ir.DataType.FLOAT)  # (B, H, Dk, Dv)
            read = w.op("ReduceSum", product, two, name="read_sum", dtype=ir.DataType.FLOAT, keepdims=0)  # (B, H, Dv)
            substitute(squeeze.outputs[0], read)
            modified = True
        return ir.passes.PassResult(model, modified)


def _row(node: ir.Node) -> ir.Value | None:
    """q, if the node multiplies the row q by something that is no weight."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    made = inputs_of(node.inputs[0], "Unsqueeze")
    axes = None if made is None else constant(made[1])
    if made is None or axes is None or axes.tolist() != [2] or constant(node.inputs[1]) is not None:
        return None
    return made[0]
