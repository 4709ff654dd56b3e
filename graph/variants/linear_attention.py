"""The decode step's retention as ONNX Runtime's `LinearAttention`, in the form that is fastest on a CPU.

Rule: the passes over the state (decay, key × value, sum, read) become one kernel, and each head is cut into pieces that fit
into a core's first-level cache. The kernel treats a piece, some rows of a head's state, as a head of its own; the read of a
head is the sum of the reads of its pieces. Pieces also give every core its share where heads are few. Twelve layers of the 148M
model's state alone, updated in place on two cores: whole heads 1.46 ms, 64 rows a piece 1.11 ms, 16 rows 0.60 ms.

    state (B, H·s, Dk/s, Dv) ─ Reshape ─ ·γ ─ + ─ Reshape ─ state_out         q, k (B, 1, H·Dk) ─┐
                                      k·v ────┘ └─ q· ─ o               ->    v, s times a head ─┴─ LinearAttention ─ Σ ─ o
                                                                                        state ───┘               └─ state_out

A piece is a run of bytes: the state of both graphs has another shape, (B, H·s, Dk/s, Dv), over the same memory, which the graphs
declare. Prefill, which runs once a chunk, reshapes it on its way in and out. As in the portable graph,
the state may be updated where it is read (the tests do so).

The operator is there since ONNX Runtime 1.25, for float32; a state in 16 bits stays in plain operators.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.states import declare_layout, states
from retnet_export.graph.variants.pattern import MICROSOFT, made_by, scope_of, size_of, substitute
from retnet_export.graph.variants.retention import Retention, log_decay, match_retention
from retnet_export.runtime.bundle.layout import StateLayout

PIECE_BYTES = 1 << 15
"""What the first-level data cache of any core meant here holds."""


def pieces_of(key_dim: int, value_dim: int) -> int:
    """Into how many pieces a head's float32 state (Dk, Dv) is cut: the fewest equal ones that fit into `PIECE_BYTES`."""
    divisors = (count for count in range(1, key_dim + 1) if key_dim % count == 0)
    return next((count for count in divisors if key_dim // count * value_dim * 4 <= PIECE_BYTES), key_dim)


class StatePiecesPass(ir.passes.InPlacePass):
    """Let the graph take and give the state in pieces, (B, H·s, Dk/s, Dv), with a Reshape at both ends."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, found = model.graph, states(model.graph)
        if any(state.dtype != ir.DataType.FLOAT for state, _ in found):
            return ir.passes.PassResult(model, False)
        for state, after in found:
            assert state.shape is not None
            batch, heads, key_dim, value_dim = state.shape[0], *(size_of(state, axis) for axis in (1, 2, 3))
            count = pieces_of(key_dim, value_dim)
            declare_layout(model, StateLayout(pieces=count))
            in_pieces = ir.Shape([batch, heads * count, key_dim // count, value_dim])
            last = after.producer()
            assert last is not None
            w = Inserter(graph, graph[0], str(state.name))
            whole = w.reshape(state, "of_heads", 0, heads, key_dim, value_dim)
            reshape = whole.producer()
            assert reshape is not None
            state.replace_all_uses_with(whole)
            reshape.replace_input_with(0, state)
            pieces = w.reshape(after, "of_pieces", 0, heads * count, key_dim // count, value_dim)
            back = pieces.producer()
            assert back is not None
            graph.remove(back)
            graph.insert_after(last, back)
            name, after.name = after.name, f"{state.name}.of_heads_out"
            pieces.name, pieces.shape, state.shape = name, in_pieces, in_pieces
            graph.outputs[graph.outputs.index(after)] = pieces
        return ir.passes.PassResult(model, bool(found))


class LinearAttentionPass(ir.passes.InPlacePass):
    """Replace the decode step's retention, where the state is in pieces."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for node in model.graph if (match := match_retention(node, "Reshape")) is not None]
        for match in found:
            _replace(model.graph, match)
        return ir.passes.PassResult(model, bool(found))


def _replace(graph: ir.Graph, found: Retention) -> None:
    w = Inserter(graph, found.node, scope_of(found.node))
    reshaped = made_by(found.v, "Reshape")
    v = found.v if reshaped is None or reshaped.inputs[0] is None else reshaped.inputs[0]
    o, state_after = attend(w, found.q, found.k, v, found.state, found.gamma)
    substitute(found.state_after, state_after)
    substitute(found.node.outputs[0], o)


def attend(
    w: Inserter, q: ir.Value, k: ir.Value, v: ir.Value, state: ir.Value, gamma: NDArray[np.generic]
) -> tuple[ir.Value, ir.Value]:
    """One token's retention over a state in pieces.

    Args:
        w: writes the nodes.
        q, k: (B, …) of H·Dk numbers.
        v: (B, …) of H·Dv numbers.
        state: (B, H·s, Dk/s, Dv).
        gamma: the decay of each head, (H,).

    Returns:
        The read (B, H, Dv), and the state after.
    """
    pieces, value_dim = size_of(state, 1), size_of(state, 3)
    heads, key_size = len(gamma), pieces * size_of(state, 2)
    count = pieces // heads
    v = w.reshape(v, "v_of_head", 0, heads, 1, value_dim)
    if count > 1:
        v = w.op("Tile", v, w.initializer(np.array([1, 1, count, 1]), "once_a_piece"), name="v_of_piece", dtype=ir.DataType.FLOAT)
    read, state_after = w.op_n(
        "LinearAttention",
        w.reshape(q, "q_joined", 0, 1, key_size),
        w.reshape(k, "k_joined", 0, 1, key_size),
        w.reshape(v, "v_joined", 0, 1, pieces * value_dim),
        state,
        _decay(w.graph, np.repeat(gamma, count)),
        names=["retention", "state_after_retention"],
        dtypes=[ir.DataType.FLOAT, ir.DataType.FLOAT],
        domain=MICROSOFT,
        q_num_heads=pieces,
        kv_num_heads=pieces,
        scale=1.0,
        update_rule="gated",
    )
    if count > 1:
        o = w.reshape(read, "o_of_piece", 0, heads, count, value_dim)
        o = w.op("ReduceSum", o, w.initializer(np.array([2]), "piece_axis"), name="o_of_head", dtype=ir.DataType.FLOAT, keepdims=0)
    else:
        o = w.reshape(read, "o_of_head", 0, heads, value_dim)
    return o, state_after


def _decay(graph: ir.Graph, gamma: NDArray[np.generic]) -> ir.Value:
    """ln γ of each piece for every sequence, (B, 1, pieces), once for all layers."""
    name = "log_decay_of_piece"
    made = next((node.outputs[0] for node in graph if node.outputs[0].name == f"decay.{name}"), None)
    if made is not None:
        return made
    rows = log_decay(graph, gamma)
    return Inserter(graph, graph[0], "decay").reshape(rows, name, -1, 1, len(gamma))  # nodes are put in order at the end
