"""Sums of two as `Add`.

Rule: quantizing writes `Sum` where a product is added to, because ONNX Runtime would otherwise make a `Gemm` of both and no
longer see the quantized weight (quantize/rewrite.py). Where the product becomes an operator of its own, that danger is over,
and the rewrites of norms look for `Add`.
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.variants.pattern import substitute


class SumAsAddPass(ir.passes.InPlacePass):
    """Replace `Sum` of two inputs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if node.op_type == "Sum" and node.domain == "" and len(node.inputs) == 2]
        for node in found:
            add = ir.node("Add", list(node.inputs), name=node.name)
            old, new = node.outputs[0], add.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}.sum"
            graph.insert_before(node, add)
            substitute(old, new)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(found))
