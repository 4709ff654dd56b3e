"""Splits of a product's row as splits into equal parts of a middle axis, which ONNX Runtime copies in its cheapest kernel.

Rule: for one sequence, splitting a row takes 2.8 µs, equal parts along a middle axis 1.4, and unequal ones 2.2 and three
copies of a description to the device. Splitting (B, n·m) along its last axis into n parts is splitting (B, n, m) along its
middle axis, and the reshapes cost nothing.

The projections' row is q and k's first channels, their second channels, v and gate. Where v is as wide as q and k together, that
is three equal parts, and the two kinds of channels come together by one Transpose instead of one Concat:

    row ─ Split ─┬─ first ──┬─ Concat ─ qk         row (B, 3, m) ─ Split ─┬─ (B, 2, heads, half) ─ Transpose ─ qk
                 ├─ second ─┘                 ->                          ├─ v
                 ├─ v                                                     └─ gate
                 └─ gate
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import constant, made_by, only_user, scope_of, substitute


class SplitRowsPass(ir.passes.InPlacePass):
    """Rewrite the decode graph's splits of products."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        if any(value.name == "length" for value in graph.inputs):  # prefill: rows are many
            return ir.passes.PassResult(model, False)
        for node in list(graph):
            x = node.inputs[0] if node.op_type == "Split" and node.attributes.get_int("axis", 0) == -1 else None
            width = _width(x)
            if x is None or width is None or x.dtype is None:
                continue
            given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            count = len(node.outputs)
            sizes = [width // count] * count if given is None else [int(size) for size in given]
            w = Inserter(graph, node, scope_of(node))
            if len(set(sizes)) == 1:
                parts = _split_equally(w, x, sizes[0], [f"{_leaf(value)}_part" for value in node.outputs])
                for old, part in zip(node.outputs, parts, strict=True):
                    substitute(old, w.reshape(part, f"{_leaf(old)}_row", 0, sizes[0]))
                modified = True
            elif len(sizes) > 2 and len({sizes[0] + sizes[1], *sizes[2:]}) == 1:
                modified |= _join_first_two(w, x, node, sizes)
        return ir.passes.PassResult(model, modified)


def _join_first_two(w: Inserter, x: ir.Value, node: ir.Node, sizes: list[int]) -> bool:
    reshapes = [only_user(part, "Reshape") for part in node.outputs[:2]]
    joins = [None if each is None else only_user(each.outputs[0], "Concat") for each in reshapes]
    shape = None if reshapes[0] is None else constant(reshapes[0].inputs[1])
    if joins[0] is None or joins[0] is not joins[1] or shape is None or shape.shape != (3,) or sizes[0] != sizes[1]:
        return False
    assert x.dtype is not None
    heads, half = int(shape[1]), int(shape[2])
    both, *rest = _split_equally(w, x, 2 * sizes[0], ["qk_part", *(f"{_leaf(value)}_part" for value in node.outputs[2:])])
    channels = w.reshape(both, "qk_channels", 0, 2, heads, half)
    turned = w.op("Transpose", channels, name="qk_by_head", dtype=x.dtype, perm=[0, 2, 1, 3])
    substitute(joins[0].outputs[0], w.reshape(turned, "qk_joined", 0, heads, 2 * half))
    for old, part in zip(node.outputs[2:], rest, strict=True):
        substitute(old, w.reshape(part, f"{_leaf(old)}_row", 0, 2 * sizes[0]))
    return True


def _split_equally(w: Inserter, x: ir.Value, size: int, names: list[str]) -> tuple[ir.Value, ...]:
    assert x.dtype is not None
    rows = w.reshape(x, f"{_leaf(x)}_rows", 0, len(names), size)
    return w.op_n("Split", rows, names=names, dtypes=[x.dtype] * len(names), axis=1, num_outputs=len(names))


def _width(value: ir.Value | None) -> int | None:
    """The number of outputs of the product that computes `value`, (B, outputs)."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "MatMulNBits":
        return producer.attributes["N"].as_int()
    node = made_by(value, "MatMul")
    weight = None if node is None else node.inputs[1]
    dequantize = made_by(weight, "DequantizeLinear")
    source = weight if dequantize is None else dequantize.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 2:
        return None
    outputs = source.shape[1]
    return outputs if isinstance(outputs, int) else None


def _leaf(value: ir.Value) -> str:
    """The last part of a value's name that says what it is."""
    parts = [part for part in (value.name or "value").split(".") if part not in ("narrow", "float32")]
    return parts[-1]
