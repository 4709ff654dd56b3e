"""Retention over few tokens as ONNX Runtime's `LinearAttention`, in the form that is fastest on a CPU.

Rule: the passes over the state (decay, key × value, sum, read) become one kernel, and each head is cut into blocks of
columns, each a run of bytes that fits into a core's first-level cache. For the kernel a block is a head of its own, with
some of the values; the queries and keys of its head it shares with the other blocks. Blocks also give every core its share
where heads are few. Several tokens go over a block while it is in the cache. Twelve layers of the 148M model's state alone,
updated in place on one core: whole heads 2.5 ms, blocks of 32 columns 1.0 ms, and 0.6 ms for each further token.

    state (B, H, Dk, Dv) ─ ·γ ─ + ─ state_out          q, k (B, T, H·Dk), v (B, T, H·Dv) ─┬─ LinearAttention ─┬─ o (B, T, H·Dv)
                      k·v ──────┘ └─ q· ─ o      ->    state (B, H·s, Dk, Dv/s) ──────────┘                   └─ state_out

The state of both graphs has that other layout, which the graphs declare. It may be updated where it is read: the kernel copies it
first only if it is to be elsewhere (the tests run both ways).

The operator is there since ONNX Runtime 1.25, for float32; a state in 16 bits stays in plain operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.states import declare_layout, states
from retnet_export.graph.variants.pattern import MICROSOFT, made_by, scope_of, size_of, substitute
from retnet_export.graph.variants.retention import Step, match_step
from retnet_export.runtime.bundle.layout import StateLayout

BLOCK_BYTES = 1 << 15
"""What the first-level data cache of any core meant here holds."""
PANEL = 32
"""Columns that the kernel takes together; a block has a multiple of them if Dv is one."""


def blocks_of(key_dim: int, value_dim: int) -> int:
    """How many blocks of a head's float32 state (Dk, Dv): the fewest that fit into `BLOCK_BYTES`, or those of one panel."""
    if value_dim % PANEL:
        return 1
    panels = value_dim // PANEL
    divisors = [count for count in range(1, panels + 1) if panels % count == 0]
    return next((count for count in divisors if value_dim // count * key_dim * 4 <= BLOCK_BYTES), panels)


def sizes_of(found: Step) -> tuple[int, int, int]:
    """H, Dk and Dv."""
    return size_of(found.state, 1), size_of(found.state, 2), size_of(found.state, 3)


class LinearAttentionPass(ir.passes.InPlacePass):
    """Replace the decode step's retention in every layer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [match_step(*pair) for pair in states(graph)]
        steps = [each for each in found if each is not None and each.state.dtype == ir.DataType.FLOAT]
        if not found or len(steps) != len(found):
            return ir.passes.PassResult(model, False)
        for each in steps:
            _replace(graph, each)
        take_blocks(model, steps)
        return ir.passes.PassResult(model, True)


def _replace(graph: ir.Graph, found: Step) -> None:
    last = found.o.producer()
    assert last is not None
    w = Inserter(graph, last, scope_of(last))
    heads, key_dim, value_dim = sizes_of(found)
    q, k, v = (
        w.reshape(unshaped(value), f"{name}_of_token", 0, 1, heads * size)
        for name, value, size in (("q", found.q, key_dim), ("k", found.k, key_dim), ("v", found.v, value_dim))
    )
    log_gamma = log_gamma_of_blocks(found)
    o, after = attend(w, q, k, v, found, _for_every_sequence(graph, log_gamma))
    substitute(found.state_after, after)
    substitute(found.o, w.reshape(o, "o_of_head", 0, heads, value_dim))


def attend(w: Inserter, q: ir.Value, k: ir.Value, v: ir.Value, found: Step, log_decay: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Retention token by token over a state in blocks.

    Args:
        w: writes the node.
        q, k: (B, T, H·Dk).
        v: (B, T, H·Dv).
        found: gives the state and its sizes.
        log_decay: ln γ before each token, (B, T, H·s).

    Returns:
        The read (B, T, H·Dv), and the state after, (B, H·s, Dk, Dv/s).
    """
    heads, key_dim, value_dim = sizes_of(found)
    o, after = w.op_n(
        "LinearAttention",
        q,
        k,
        v,
        found.state,
        log_decay,
        names=["retention", "state_after_retention"],
        dtypes=[ir.DataType.FLOAT, ir.DataType.FLOAT],
        domain=MICROSOFT,
        q_num_heads=heads,
        kv_num_heads=heads * blocks_of(key_dim, value_dim),
        scale=1.0,
        update_rule="gated",
    )
    return o, after


def log_gamma_of_blocks(found: Step) -> NDArray[np.float32]:
    """ln γ of each block, (1, 1, H·s)."""
    _, key_dim, value_dim = sizes_of(found)
    log_gamma = np.log(found.gamma.astype(np.float64)).astype(np.float32)
    return np.repeat(log_gamma, blocks_of(key_dim, value_dim))[None, None]


def take_blocks(model: ir.Model, found: Sequence[Step]) -> None:
    """Let the graph take and give the states in blocks, (B, H·s, Dk, Dv/s)."""
    outputs = {value.name: value for value in model.graph.outputs}
    for each in found:
        heads, key_dim, value_dim = sizes_of(each)
        layout = StateLayout(pieces=blocks_of(key_dim, value_dim))
        assert each.state.shape is not None
        shape = ir.Shape([each.state.shape[0], *layout.shape((1, heads, key_dim, value_dim))[1:]])
        each.state.shape = outputs[f"{each.state.name}_out"].shape = shape
        declare_layout(model, layout)


def unshaped(value: ir.Value) -> ir.Value:
    """What was cut off a product, before it was shaped into heads; the value itself if it was computed in between."""
    reshape = made_by(value, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    return source if source is not None and made_by(source, "Split") is not None else value


def _for_every_sequence(graph: ir.Graph, log_gamma: NDArray[np.float32]) -> ir.Value:
    """ln γ (B, 1, H·s), once for all layers; B is taken from the position, whose values do not matter."""
    name = "log_decay_of_block"
    made = next((node.outputs[0] for node in graph if node.outputs[0].name == f"decay.{name}"), None)
    if made is not None:
        return made
    position = next(value for value in graph.inputs if value.name == "position")
    w = Inserter(graph, graph[0], "decay")  # nodes are put in order at the end
    nothing = w.op("Mul", position, w.initializer(np.array(0, np.int64), "int_zero"), name="zero_int", dtype=ir.DataType.INT64)
    column = w.reshape(w.cast(nothing, ir.DataType.FLOAT, "zero"), "zero_column", -1, 1, 1)
    return w.op("Add", column, w.initializer(log_gamma, "log_gamma_of_block"), name=name, dtype=ir.DataType.FLOAT)
