"""The rotation of queries and keys as one `RotaryEmbedding` over the projections as they come.

Rule: the product of q, k, v and gate gives the first channels of all rotary pairs of all heads, then all second channels
(`rotated_projection_order`). That is one head of the operator, (H+G)·Dk wide, whose tables repeat the angles for each head. So
nothing is put together before; afterwards the two halves of each head are brought side by side by one Transpose.

    joined ─ Split ─┬─ first  ─ Reshape ─┬ ·cos ·sin ┬─ Concat ─ Split ─ q, k (…, heads, Dk)
                    ├─ second ─ Reshape ─┴ ·cos ·sin ┘
                    └─ v, gate                                                   ->

    joined ─ Split ─┬─ pairs ─ RotaryEmbedding ─ Transpose (halves, heads) ─ Split ─ q, k (…, heads·Dk) ─ Reshape ─ q, k
                    └─ v, gate

The angles stay those of the graph, from the exact integer phase: the operator's tables have a row for each token of each
sequence, and `row_of_token` says which row is whose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import MICROSOFT, constant, inputs_of, made_by, only_user, scope_of, substitute


@dataclass(frozen=True)
class _Rotation:
    """One layer's rotation.

    Attributes:
        split: cuts the product into first channels, second channels and the rest.
        cos, sin: (lead…, 1, Dk/2).
        heads: cuts the rotated heads into q and k.
        counts: how many heads are queries, and how many keys.
        lead: leading axes: 1 in decode, 2 in prefill.
        half: Dk/2.
    """

    split: ir.Node
    cos: ir.Value
    sin: ir.Value
    heads: ir.Node
    counts: tuple[int, int]
    lead: int
    half: int


class RotationPass(ir.passes.InPlacePass):
    """Replace every rotation whose result is cut into queries and keys."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for node in model.graph if (match := _match(node)) is not None]
        for match in found:
            _replace(model.graph, match)
        return ir.passes.PassResult(model, bool(found))


def _match(node: ir.Node) -> _Rotation | None:
    """Split(Concat(first·cos - second·sin, second·cos + first·sin)), of halves that one Split gives."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    pairs = inputs_of(node.inputs[0], "Sub"), inputs_of(node.inputs[1], "Add")
    products = [inputs_of(each, "Mul") for pair in pairs if pair for each in pair]
    heads = only_user(node.outputs[0], "Split")
    if len(products) != 4 or any(each is None for each in products) or heads is None:
        return None
    (first, cos), (second, sin), again, last = (each for each in products if each is not None)
    halves = [made_by(value, "Reshape") for value in (first, second)]
    counts, shapes = constant(heads.inputs[1]), [constant(each.inputs[1]) for each in halves if each is not None]
    if again != (second, cos) or last != (first, sin) or counts is None or len(counts) != 2 or len(shapes) != 2:
        return None
    split = made_by(halves[0].inputs[0], "Split") if halves[0] is not None else None
    if split is None or halves[1] is None or halves[1].inputs[0] is not split.outputs[1] or shapes[0] is None:
        return None
    lead = len(shapes[0]) - 2
    return _Rotation(split, cos, sin, heads, (int(counts[0]), int(counts[1])), lead, int(shapes[0][-1]))


def _replace(graph: ir.Graph, found: _Rotation) -> None:
    scope, heads, width = scope_of(found.split), sum(found.counts), sum(found.counts) * found.half
    w = Inserter(graph, found.split, scope)
    sizes = constant(found.split.inputs[1])
    assert sizes is not None
    rest = [int(size) for size in sizes[2:]]
    names = ["pairs", *(f"{str(value.name).rpartition('.')[2]}_of_rotated" for value in found.split.outputs[2:])]
    pairs, *others = w.op_n(
        "Split",
        found.split.inputs[0],
        w.initializer(np.array([2 * width, *rest], np.int64), "rotated_sizes"),
        names=names,
        dtypes=[ir.DataType.FLOAT] * len(names),
        axis=-1,
    )
    for old, new in zip(found.split.outputs[2:], others, strict=True):
        substitute(old, new)
    w = Inserter(graph, found.heads, scope)
    keep = (0,) * found.lead
    if found.lead == 1:
        pairs = w.reshape(pairs, "pairs_of_token", 0, 1, 2 * width)
    tables = [_table(graph, angle, name, heads, found.half) for angle, name in ((found.cos, "cos"), (found.sin, "sin"))]
    rows = _row_of_token(graph, found.lead)
    turned = w.op("RotaryEmbedding", pairs, rows, *tables, name="rotated", dtype=ir.DataType.FLOAT, domain=MICROSOFT)
    halves = w.reshape(turned, "rotated_halves", *keep, 2, heads, found.half)
    order = [*range(found.lead), found.lead + 1, found.lead, found.lead + 2]
    side = w.op("Transpose", halves, name="rotated_heads", dtype=ir.DataType.FLOAT, perm=order)
    flat = w.reshape(side, "rotated_flat", *keep, 2 * width)
    key_dim = 2 * found.half
    counts = np.array([count * key_dim for count in found.counts], np.int64)
    parts = w.op_n(
        "Split", flat, w.initializer(counts, "qk_sizes"), names=["q_flat", "k_flat"], dtypes=[ir.DataType.FLOAT] * 2, axis=-1
    )
    for old, part, count, name in zip(found.heads.outputs, parts, found.counts, ("q_heads", "k_heads"), strict=True):
        substitute(old, w.reshape(part, name, *keep, count, key_dim))


def _row_of_token(graph: ir.Graph, lead: int) -> ir.Value:
    """0 … B·C - 1 as (B, C), once for all layers."""
    made = _made(graph, "rotation.row_of_token")
    if made is not None:
        return made
    w = Inserter(graph, graph[0], "rotation")  # nodes are put in order at the end
    tokens = next(value for value in graph.inputs if value.name == "tokens")
    count = w.reshape(w.op("Size", tokens, name="tokens_size", dtype=ir.DataType.INT64), "tokens_count")
    zero, one = (w.initializer(np.array(value, np.int64), f"row_{value}") for value in (0, 1))
    rows = w.op("Range", zero, count, one, name="rows", dtype=ir.DataType.INT64)
    if lead == 1:
        return w.reshape(rows, "row_of_token", -1, 1)
    shape = w.op("Shape", tokens, name="tokens_shape", dtype=ir.DataType.INT64)
    return w.op("Reshape", rows, shape, name="row_of_token", dtype=ir.DataType.INT64)


def _table(graph: ir.Graph, angle: ir.Value, name: str, heads: int, half: int) -> ir.Value:
    """cos or sin (lead…, 1, half) as the operator's table (B·C, heads·half), once for all layers."""
    made = _made(graph, f"rotation.{name}_table")
    if made is not None:
        return made
    producer = angle.producer()
    assert producer is not None
    w = Inserter(graph, producer, "rotation")
    rows = w.reshape(angle, f"{name}_rows", -1, half)
    times = w.initializer(np.array([1, heads], np.int64), "once_a_head")
    return w.op("Tile", rows, times, name=f"{name}_table", dtype=ir.DataType.FLOAT)


def _made(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((node.outputs[0] for node in graph if node.outputs[0].name == name), None)
