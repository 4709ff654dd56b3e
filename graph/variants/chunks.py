"""Prefill in three forms, of which a run takes the one that is fastest for its tokens, so that one session with one copy of the
weights reads prompts, drafts, batches and steps.

Rule: an `If` around each layer's retention chooses; what is computed is the same. No weight is inside, since ONNX Runtime
would pack it for each branch. The powers of γ that the second and third form share are in an `If` of their own.

    few, all real:  LinearAttention over the state where it is, as in decode
    few:            the same; keys and decay of what is no real token are 0, so that the state is that of the real tokens, and
                    what is read is read from it. Tokens after them (drafts) see it from further away, and each other:
                    o_j = γ^(j-n+1) · read_j + Σ_{n≤m≤j} γ^(j-m) (q_j·k_m) v_m
    many:           the chunkwise form of graph/prefill.py, over the state in blocks of columns

    q, k, v, state ─ If plain ─┬─ then  LinearAttention ────────────────────────────────┬─ o (B, C, H·Dv), state_out
                               └─ else  If few ─┬─ then  LinearAttention + drafts ──────┤
                                                └─ else  chunkwise form ────────────────┘

Every form may write the state where it read it: the first two by their operator; in the third the sum that is written waits for the
read of the state, because it takes its shape from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.states import allow_in_place, states
from retnet_export.graph.variants.linear_attention import (
    attend,
    blocks_of,
    log_gamma_of_blocks,
    sizes_of,
    take_blocks,
    unshaped,
)
from retnet_export.graph.variants.pattern import inputs_of, scope_of, substitute
from retnet_export.graph.variants.retention import Chunk, match_chunk

FEW = 16
"""The most tokens for which passing over the state once, token by token in the cache, is faster than the chunkwise form."""
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class _Shared:
    """What all layers share.

    Attributes:
        plain, few: conditions, bool.
        real: 1 for a real token, else 0, (B, C, 1).
        log_decay: ln γ before a real token, else 0, (B, C, H·s).
        within, since_state, to_end: as in graph/prefill.py.
        whole: γⁿ of each block, (B, H·s, 1, 1).
        of_drafts: `within`, and 0 for real tokens, (B, H, C, C).
        since_real: γ^max(0, j-n+1), (B, C, H, 1).
    """

    plain: ir.Value
    few: ir.Value
    real: ir.Value
    log_decay: ir.Value
    within: ir.Value
    since_state: ir.Value
    to_end: ir.Value
    whole: ir.Value
    of_drafts: ir.Value
    since_real: ir.Value


class ChunkFormsPass(ir.passes.InPlacePass):
    """Put each layer's retention of the prefill graph into an `If`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        length = next((value for value in graph.inputs if value.name == "length"), None)
        found = [] if length is None else [match_chunk(*pair) for pair in states(graph)]
        chunks = [each for each in found if each is not None and each.state.dtype == FLOAT]
        real = _real(chunks[0]) if chunks else None
        if length is None or real is None or len(chunks) != len(found):
            return ir.passes.PassResult(model, False)
        shared = _share(graph, chunks[0], length, real)
        for each in chunks:
            _branch(graph, each, shared)
        take_blocks(model, chunks)
        allow_in_place(model, chunks=True)
        return ir.passes.PassResult(model, True)


def _real(chunk: Chunk) -> ir.Value | None:
    """(B, C) of ζ = Where(Unsqueeze(real), …)."""
    parts = inputs_of(chunk.to_end, "Where")
    row = inputs_of(parts[0], "Unsqueeze") if parts else None
    return row[0] if row else None


def _share(graph: ir.Graph, chunk: Chunk, length: ir.Value, real: ir.Value) -> _Shared:
    w = Inserter(graph, graph[0], "chunk")  # nodes are put in order at the end
    heads, key_dim, value_dim = sizes_of(chunk)
    blocks = blocks_of(key_dim, value_dim)
    tokens = next(value for value in graph.inputs if value.name == "tokens")
    shape = w.op("Shape", tokens, name="count_list", dtype=ir.DataType.INT64, start=1, end=2)
    count = w.reshape(shape, "count")
    least = w.op("ReduceMin", length, name="least", dtype=ir.DataType.INT64, keepdims=0)
    most = w.initializer(np.array(FEW, np.int64), "few_tokens")
    few = w.op("LessOrEqual", count, most, name="few", dtype=ir.DataType.BOOL)
    full = w.op("Equal", least, count, name="full", dtype=ir.DataType.BOOL)
    plain = w.op("And", few, full, name="plain", dtype=ir.DataType.BOOL)
    column = w.op("Unsqueeze", real, w.initializer(np.array([2]), "token_axis"), name="real_column", dtype=ir.DataType.BOOL)
    mask = w.cast(column, FLOAT, "real_number")
    log_gamma = w.initializer(log_gamma_of_blocks(chunk), "log_gamma_of_block")
    log_decay = w.op("Mul", mask, log_gamma, name="log_decay", dtype=FLOAT)
    names = ("within", "since_state", "to_end", "whole_of_block", "of_drafts", "since_real")

    def empty(w: Inserter) -> list[ir.Value]:
        nothing = ir.tensor(np.zeros((0, 0, 0, 0), np.float32))
        return [w.op("Constant", name=f"no_{name}", dtype=FLOAT, value=nothing) for name in names]

    def powers(w: Inserter) -> list[ir.Value]:
        times = w.initializer(np.array([1, 1, blocks, 1]), "once_a_block")
        whole = w.op("Tile", w.reshape(chunk.whole, "whole_of_head", 0, heads, 1, 1), times, name="whole_tiled", dtype=FLOAT)
        whole = w.reshape(whole, "whole_of_block", 0, heads * blocks, 1, 1)
        row = w.op("Unsqueeze", mask, w.initializer(np.array([1]), "head_axis"), name="real_head", dtype=FLOAT)  # (B, 1, C, 1)
        row = w.op("Transpose", row, name="real_row", dtype=FLOAT, perm=[0, 1, 3, 2])
        draft = w.op("Sub", w.initializer(np.array(1, np.float32), "float_1"), row, name="draft_row", dtype=FLOAT)
        of_drafts = w.op("Mul", chunk.within, draft, name="of_drafts", dtype=FLOAT)
        # Tokens from the last real one to j: none for real ones. (B, C, 1, 1)
        index = w.op(
            "CumSum",
            w.op("Sub", w.initializer(np.array(1, np.float32), "float_1"), mask, name="draft", dtype=FLOAT),
            w.initializer(np.array(1), "int_1"),
            name="drafts_so_far",
            dtype=FLOAT,
        )
        log = w.initializer(np.log(chunk.gamma.astype(np.float64)).astype(np.float32)[:, None], "log_gamma_column")  # (H, 1)
        index = w.op("Unsqueeze", index, w.initializer(np.array([3]), "last_axis"), name="drafts_column", dtype=FLOAT)
        since_real = w.op("Exp", w.op("Mul", index, log, name="since_real_log", dtype=FLOAT), name="since_real", dtype=FLOAT)
        return [chunk.within, chunk.since_state, chunk.to_end, whole, of_drafts, since_real]

    moved = _only_for(graph, [chunk.within, chunk.since_state, chunk.to_end, chunk.whole])
    then, otherwise = _subgraph(graph, "chunk.no_powers", empty), _subgraph(graph, "chunk.powers", powers, moved)
    branch = _if(plain, "chunk.powers_or_none", [f"chunk.{name}" for name in names], then, otherwise)
    graph.append(branch)
    return _Shared(plain, few, mask, log_decay, *branch.outputs)


def _only_for(graph: ir.Graph, values: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that nothing but `values` needs, in order."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    wanted, before = set(values), None
    while before != len(found):
        before = len(found)
        found = {
            node
            for node in found
            if all(value in wanted or all(user in found for user in value.consumers()) for value in node.outputs)
        }
    return [node for node in graph if node in found]


def _branch(graph: ir.Graph, chunk: Chunk, shared: _Shared) -> None:
    last = chunk.o.producer()
    assert last is not None
    scope = scope_of(last)
    heads, key_dim, value_dim = sizes_of(chunk)
    w = Inserter(graph, last, scope)
    q, k, v = (
        source if (source := unshaped(value)) is not value else w.reshape(value, f"{name}_joined", 0, 0, heads * size)
        for name, value, size in (("q", chunk.q, key_dim), ("k", chunk.k, key_dim), ("v", chunk.v, value_dim))
    )

    def plain(w: Inserter) -> Sequence[ir.Value]:
        return attend(w, q, k, v, chunk, shared.log_decay)

    def few(w: Inserter) -> Sequence[ir.Value]:
        return _few(w, q, k, v, chunk, shared)

    def many(w: Inserter) -> Sequence[ir.Value]:
        return _many(w, q, k, v, chunk, shared)

    def few_or_many(w: Inserter) -> Sequence[ir.Value]:
        then, otherwise = _subgraph(graph, f"{scope}.few", few), _subgraph(graph, f"{scope}.many", many)
        inner = _if(shared.few, f"{scope}.few_or_many", [f"{scope}.o_of_chunk", f"{scope}.state_of_chunk"], then, otherwise)
        graph.append(inner)
        return inner.outputs

    then, otherwise = _subgraph(graph, f"{scope}.plain", plain), _subgraph(graph, f"{scope}.chunk", few_or_many)
    branch = _if(shared.plain, f"{scope}.plain_or_chunk", [f"{scope}.o_joined", f"{scope}.state_written"], then, otherwise)
    graph.append(branch)
    o, after = branch.outputs
    substitute(chunk.state_after, after)
    substitute(chunk.o, w.reshape(o, "o_of_head", 0, 0, heads, value_dim))


def _few(w: Inserter, q: ir.Value, k: ir.Value, v: ir.Value, chunk: Chunk, shared: _Shared) -> Sequence[ir.Value]:
    heads, key_dim, value_dim = sizes_of(chunk)
    read, after = attend(w, q, w.op("Mul", k, shared.real, name="k_real", dtype=FLOAT), v, chunk, shared.log_decay)
    scores = w.op(
        "MatMul", _of_head(w, q, "q", heads, key_dim), _of_head(w, k, "k", heads, key_dim, turned=True), name="scores", dtype=FLOAT
    )  # (B, H, C, C)
    scores = w.op("Mul", scores, shared.of_drafts, name="scores_of_drafts", dtype=FLOAT)
    drafts = w.op("MatMul", scores, _of_head(w, v, "v", heads, value_dim), name="read_drafts", dtype=FLOAT)  # (B, H, C, Dv)
    drafts = w.op("Transpose", drafts, name="read_drafts_of_token", dtype=FLOAT, perm=[0, 2, 1, 3])
    read = w.op("Mul", w.reshape(read, "read_of_head", 0, 0, heads, value_dim), shared.since_real, name="read_decayed", dtype=FLOAT)
    total = w.op("Add", read, drafts, name="read", dtype=FLOAT)
    return w.reshape(total, "o", 0, 0, heads * value_dim), after


def _many(w: Inserter, q: ir.Value, k: ir.Value, v: ir.Value, chunk: Chunk, shared: _Shared) -> Sequence[ir.Value]:
    heads, key_dim, value_dim = sizes_of(chunk)
    blocks = blocks_of(key_dim, value_dim)
    width = value_dim // blocks
    queries, keys = _of_head(w, q, "q", heads, key_dim), _of_head(w, k, "k", heads, key_dim, turned=True)
    values = w.reshape(v, "v_of_block", 0, 0, heads, blocks, width)
    values = w.op("Transpose", values, name="v_block", dtype=FLOAT, perm=[0, 2, 3, 1, 4])  # (B, H, s, C, Dv/s)
    state = w.reshape(chunk.state, "state_of_head", 0, heads, blocks, key_dim, width)

    def times(left: ir.Value, power: ir.Value, right: ir.Value, name: str) -> ir.Value:
        """(left · power) right, for every block of a head."""
        left = w.op("Mul", left, power, name=f"{name}_decayed", dtype=FLOAT)
        left = w.op("Unsqueeze", left, w.initializer(np.array([2]), "block_axis"), name=f"{name}_of_head", dtype=FLOAT)
        return w.op("MatMul", left, right, name=name, dtype=FLOAT)

    scores = w.op("MatMul", queries, keys, name="scores", dtype=FLOAT)  # (B, H, C, C)
    inner = times(scores, shared.within, values, "read_chunk")  # (B, H, s, C, Dv/s)
    cross = times(queries, shared.since_state, state, "read_state")
    o = w.op("Add", inner, cross, name="read", dtype=FLOAT)
    o = w.reshape(w.op("Transpose", o, name="read_of_token", dtype=FLOAT, perm=[0, 3, 1, 2, 4]), "o", 0, 0, heads * value_dim)
    update = times(keys, shared.to_end, values, "key_value")  # (B, H, s, Dk, Dv/s)
    # The shape comes from what was read of the state, so that the state is written after that.
    batch = w.op("Shape", cross, name="batch", dtype=ir.DataType.INT64, start=0, end=1)
    shape = w.op(
        "Concat",
        batch,
        w.initializer(np.array([heads * blocks, key_dim, width]), "block_shape"),
        name="shape_of_blocks",
        dtype=ir.DataType.INT64,
        axis=0,
    )
    update = w.op("Reshape", update, shape, name="key_value_of_block", dtype=FLOAT)
    decayed = w.op("Mul", chunk.state, shared.whole, name="decayed", dtype=FLOAT)
    return o, w.op("Add", decayed, update, name="state_after", dtype=FLOAT)


def _of_head(w: Inserter, x: ir.Value, name: str, heads: int, size: int, *, turned: bool = False) -> ir.Value:
    """(B, C, H·size) -> (B, H, C, size), or (B, H, size, C)."""
    order = [0, 2, 3, 1] if turned else [0, 2, 1, 3]
    return w.op("Transpose", w.reshape(x, f"{name}_heads", 0, 0, heads, size), name=f"{name}_head", dtype=FLOAT, perm=order)


def _subgraph(
    graph: ir.Graph, name: str, write: Callable[[Inserter], Sequence[ir.Value]], moved: Sequence[ir.Node] = ()
) -> ir.Graph:
    """A branch of the nodes `moved` and of those that `write` writes; it gives what `write` returns."""
    before = set(graph)
    outputs = write(Inserter(graph, None, name))
    nodes = [*moved, *(node for node in graph if node not in before)]
    graph.remove(nodes)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _if(condition: ir.Value, name: str, outputs: Sequence[str], then: ir.Graph, otherwise: ir.Graph) -> ir.Node:
    branches = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
    node = ir.node("If", [condition], num_outputs=len(outputs), name=name)
    for branch in branches:
        node.attributes[branch.name] = branch
    for value, full in zip(node.outputs, outputs, strict=True):
        value.name, value.type = full, ir.TensorType(FLOAT)
    return node
