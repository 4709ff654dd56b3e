"""What rewrites of retention share: rotation as one `RotaryEmbedding`, and how a step's retention is found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import (
    MICROSOFT,
    constant,
    inputs_of,
    made_by,
    narrowed,
    scope_of,
    substitute,
)


class RotaryEmbeddingPass(ir.passes.InPlacePass):
    """Six elementwise kernels become one.

    The angles stay those of the graph, from the exact integer phase: the operator's tables are the cosines and sines of this
    step, one row a sequence, so it is handed the batch as its sequence axis.
    """

    axes: tuple[int, ...] = (3,)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            found = _match_rotation(node, self.axes)
            if found is None:
                continue
            first, second, cos, sin, lead, heads, half = found
            w = Inserter(graph, node, scope_of(node))
            narrow = [narrowed(each) for each in (first, second)]
            dtype = narrow[0][1] if narrow[0] is not None and narrow[1] is not None else ir.DataType.FLOAT
            parts = [each[0] for each in narrow if each is not None] if dtype != ir.DataType.FLOAT else [first, second]
            joined = w.op("Concat", *parts, name="qk_unrotated", dtype=dtype, axis=-1)
            packed = w.reshape(joined, "qk_packed", *((1, -1) if lead == 1 else (0, 0)), 2 * heads * half)
            places = w.initializer(np.zeros(1, np.int64), "rotary_start") if lead == 1 else _rows_of_table(graph)
            tables = [_table(graph, angle, name, half, dtype) for angle, name in ((cos, "cos"), (sin, "sin"))]
            turned = w.op("RotaryEmbedding", packed, places, *tables, name="qk_rotated", dtype=dtype, domain=MICROSOFT)
            result = w.reshape(turned, "qk_of_head", *((-1,) if lead == 1 else (0, 0)), heads, 2 * half)
            substitute(node.outputs[0], w.cast(result, ir.DataType.FLOAT, "qk_float32") if dtype != ir.DataType.FLOAT else result)
            modified = True
        return ir.passes.PassResult(model, modified)


class RotaryEmbeddingOfChunksPass(RotaryEmbeddingPass):
    """The same of prefill's four axes: the tables have a row for each token of each sequence, and say which row is whose."""

    axes = (3, 4)


def _rows_of_table(graph: ir.Graph) -> ir.Value:
    """0 … B·C - 1 as (B, C), once for all layers."""
    name = "rotation.row_of_token"
    made = next((node.outputs[0] for node in graph if node.outputs[0].name == name), None)
    if made is not None:
        return made
    w = Inserter(graph, graph[0], "rotation")  # nodes are put in order at the end
    tokens = next(value for value in graph.inputs if value.name == "tokens")
    shape = w.op("Shape", tokens, name="tokens_shape", dtype=ir.DataType.INT64)
    count = w.reshape(w.op("Size", tokens, name="tokens_size", dtype=ir.DataType.INT64), "tokens_count")
    zero, one = (w.initializer(np.array(value, np.int64), f"row_{value}") for value in (0, 1))
    rows = w.op("Range", zero, count, one, name="rows", dtype=ir.DataType.INT64)
    return w.op("Reshape", rows, shape, name="row_of_token", dtype=ir.DataType.INT64)


@dataclass(frozen=True)
class Retention:
    """One layer's retention in the decode graph.

    Attributes:
        q, k: (B, H, Dk).
        v: (B, H, Dv).
        state: a graph input, in the layout of the variant.
        state_after: the graph output that is to hold the state after the step.
        gamma: the decay of each head, (H,).
        node: computes the read o, (B, H, Dv).
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    state: ir.Value
    state_after: ir.Value
    gamma: NDArray[np.generic]
    node: ir.Node


def match_retention(node: ir.Node, turn: str) -> Retention | None:
    """Squeeze(MatMul(q, total)) and turn(total), where total = Add(Mul(turn(state), gamma), Mul(k, v)).

    Args:
        node: any node; matches if it is that Squeeze.
        turn: the operator that takes the state from the layout of the variant to (B, H, Dk, Dv) and back.
    """
    product = inputs_of(node.inputs[0], "MatMul") if node.op_type == "Squeeze" else None
    total = inputs_of(product[1], "Add") if product else None
    decayed, outer = (inputs_of(each, "Mul") for each in total) if total else (None, None)
    before = inputs_of(decayed[0], turn) if decayed else None
    if product is None or decayed is None or outer is None or before is None:
        return None
    gamma, lines = constant(decayed[1]), [inputs_of(each, "Unsqueeze") for each in (product[0], *outer)]
    after = [user.outputs[0] for user in product[1].consumers() if user.op_type == turn]
    # γ may be written once a head or once a row of the state: it is the head's either way.
    if (
        gamma is None
        or gamma.ndim != 3
        or (gamma != gamma[:, :1, :1]).any()
        or any(each is None for each in lines)
        or len(after) != 1
        or not before[0].is_graph_input()
    ):
        return None
    q, k, v = (each[0] for each in lines if each is not None)
    return Retention(q, k, v, before[0], after[0], gamma[:, 0, 0], node)


def log_decay(graph: ir.Graph, gamma: NDArray[np.generic]) -> ir.Value:
    """ln γ for every sequence, (B, H), once for all layers; B is taken from the position, whose values do not matter."""
    log_gamma = np.log(gamma.astype(np.float64)).astype(np.float32)
    name = "log_decay_of_sequence"
    made = next((node.outputs[0] for node in graph if node.outputs[0].name == f"decay.{name}"), None)
    if made is not None:
        return made
    position = next(value for value in graph.inputs if value.name == "position")
    w = Inserter(graph, graph[0], "decay")
    zero = w.initializer(np.array(0, np.int64), "int_zero")
    nothing = w.cast(w.op("Mul", position, zero, name="zero_int", dtype=ir.DataType.INT64), ir.DataType.FLOAT, "zero")
    column = w.reshape(nothing, "zero_column", -1, 1)
    return w.op("Add", column, w.initializer(log_gamma[None], "log_gamma_row"), name=name, dtype=ir.DataType.FLOAT)


def _match_rotation(node: ir.Node, axes: tuple[int, ...]) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value, int, int, int] | None:
    """Concat(first·cos - second·sin, second·cos + first·sin) of (B, heads, half), 3 axes, or (B, C, heads, half)."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    pairs = inputs_of(node.inputs[0], "Sub"), inputs_of(node.inputs[1], "Add")
    products = [inputs_of(each, "Mul") for pair in pairs if pair for each in pair]
    if len(products) != 4 or any(each is None for each in products):
        return None
    (first, cos), (second, sin), again, last = (each for each in products if each is not None)
    shapes = [each.inputs[1] for value in (first, second) if (each := made_by(_wide_source(value), "Reshape"))]
    shape = constant(shapes[0]) if len(shapes) == 2 else None
    if again != (second, cos) or last != (first, sin) or shape is None or len(shape) not in axes:
        return None
    return first, second, cos, sin, len(shape) - 2, int(shape[-2]), int(shape[-1])


def _wide_source(value: ir.Value) -> ir.Value:
    before = narrowed(value)
    return value if before is None else before[0]


def _table(graph: ir.Graph, angle: ir.Value, name: str, half: int, dtype: ir.DataType) -> ir.Value:
    """cos or sin (B, 1, half) as the operator's table (B, half), once for all layers."""
    full = f"rotation.{name}_table"
    made = next((node.outputs[0] for node in graph if node.outputs[0].name == full), None)
    if made is not None:
        return made
    producer = angle.producer()
    assert producer is not None
    w = Inserter(graph, producer, "rotation")  # nodes are put in order at the end
    if dtype != ir.DataType.FLOAT:
        angle = w.cast(angle, dtype, f"{name}_narrow")
    return w.reshape(angle, f"{name}_table", -1, half)
