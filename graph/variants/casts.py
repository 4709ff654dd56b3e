"""Casts to float32 moved below operators that only move data, so that these move half the bytes and later rewrites see them.

Rule: Reshape, Split and Gather of a cast value are the cast of their results, and a cast up and down again is nothing; no bit
changes. A cast that nothing needs any more is dropped with the other dead nodes.

    x16 ─ Cast ─ Split ─┬─ a             x16 ─ Split ─┬─ Cast ─ a
                        └─ b      ->                  └─ Cast ─ b
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.variants.pattern import narrowed, substitute

MOVES_DATA = frozenset({"Reshape", "Split", "Gather"})


class SinkCastsPass(ir.passes.InPlacePass):
    """Move casts to float32 down, as far as they go."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type == "Cast" and node.inputs[0] is not None:
                wide = narrowed(node.inputs[0])
                if wide is not None and wide[1] == node.outputs[0].dtype and not node.outputs[0].is_graph_output():
                    substitute(node.outputs[0], wide[0])
                    modified = True
                continue
            before = narrowed(node.inputs[0]) if node.op_type in MOVES_DATA and node.domain == "" and node.inputs[0] else None
            if before is None:
                continue
            source, dtype = before
            outputs = list(node.outputs)
            moved = ir.node(
                node.op_type,
                [source, *node.inputs[1:]],
                dict(node.attributes.items()),
                num_outputs=len(outputs),
                name=f"{node.name}.narrow",
            )
            graph.insert_before(node, moved)
            for old, new in zip(outputs, moved.outputs, strict=True):
                new.name, new.type = f"{old.name}.narrow", ir.TensorType(dtype)
                cast = ir.node("Cast", [new], {"to": ir.DataType.FLOAT}, name=f"{old.name}.float32")
                cast.outputs[0].name, cast.outputs[0].type = f"{old.name}.float32", ir.TensorType(ir.DataType.FLOAT)
                graph.insert_before(node, cast)
                substitute(old, cast.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)
