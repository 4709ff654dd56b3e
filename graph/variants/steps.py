"""Prefill that becomes a step when it reads one token, so that one session with one copy of the weights does both.

Rule: of a chunk of one real token per sequence, retention is what it is in decode.onnx, one operator over the state in place; of
any other chunk, the chunkwise form. An `If` around each layer's retention takes the one or the other. No weight is inside it, since
ONNX Runtime would pack it for each branch. What is computed is the same; only the passes over the state differ.

    one_each = (C · min length = 1), once for all layers

    q, k, v, state ─ If one_each ─┬─ then  LinearAttention, as in linear_attention.py ────────────────┬─ o, state_out
                                  └─ else  the nodes of the chunkwise form, the state joined and cut ─┘

Measured before, 148M in INT4: for one token this variant's prefill graph took 1.4 times a step, because the reshapes of the state
at both ends are copies (12 layers, 1.5 MB each way) and the chunkwise form goes over the state five times. Now it is 1.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.states import allow_steps_in_place, states
from retnet_export.graph.variants.linear_attention import attend
from retnet_export.graph.variants.pattern import constant, inputs_of, only_user, scope_of, size_of, substitute


@dataclass(frozen=True)
class _Chunk:
    """One layer's retention in the prefill graph, the state in pieces.

    Attributes:
        q, k, v: (B, C, H, Dk) and (B, C, H, Dv).
        state: a graph input.
        state_after: the graph output that is to hold the state after the chunk.
        o: the read, (B, C, H, Dv).
        gamma: the decay of each head, (H,).
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    state: ir.Value
    state_after: ir.Value
    o: ir.Value
    gamma: NDArray[np.generic]

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes between them, in order; values that all layers share are computed outside."""
        given = {self.q, self.k, self.v, self.state}
        found: dict[ir.Node, None] = {}

        def visit(value: ir.Value | None) -> bool:
            """Whether a value depends on what is given; its node is then among those found."""
            if value is None or value in given:
                return value is not None
            node = value.producer()
            if node is None:
                return False
            if node in found:
                return True
            depends = [visit(each) for each in node.inputs]
            if any(depends):
                found[node] = None
            return any(depends)

        visit(self.o)
        visit(self.state_after)
        return list(found)


class StepBranchPass(ir.passes.InPlacePass):
    """Put each layer's retention of the prefill graph into an `If`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        length = next((value for value in graph.inputs if value.name == "length"), None)
        found = [] if length is None else [_match(*pair) for pair in states(graph)]
        if length is None or not found or any(chunk is None for chunk in found):
            return ir.passes.PassResult(model, False)
        condition = _one_each(graph, length)
        for chunk in found:
            if chunk is not None:
                _branch(graph, chunk, condition)
        allow_steps_in_place(model)
        return ir.passes.PassResult(model, True)


def _match(state: ir.Value, after: ir.Value) -> _Chunk | None:
    """state_out = Reshape(Add(Mul(Reshape(state), γⁿ), MatMul(Mul(kᵀ, ζ), v))), and o, which reads the same state."""
    whole = only_user(state, "Reshape")
    total = inputs_of(after, "Reshape")
    terms = inputs_of(total[0], "Add") if total else None
    decayed, update = (inputs_of(terms[0], "Mul"), inputs_of(terms[1], "MatMul")) if terms else (None, None)
    power = inputs_of(decayed[1], "Exp") if decayed else None
    log = inputs_of(power[0], "Mul") if power else None
    log_gamma = constant(log[1]) if log else None
    decayed_key = inputs_of(update[0], "Mul") if update else None
    k, v = inputs_of(_first(decayed_key), "Transpose"), inputs_of(_second(update), "Transpose")
    readers = [] if whole is None else [user for user in whole.outputs[0].consumers() if user.op_type == "MatMul"]
    query = inputs_of(readers[0].inputs[0], "Mul") if len(readers) == 1 else None
    q = inputs_of(_first(query), "Transpose")
    read = only_user(readers[0].outputs[0], "Add") if len(readers) == 1 else None
    o = None if read is None else only_user(read.outputs[0], "Transpose")
    if q is None or k is None or v is None or o is None or log_gamma is None:
        return None
    gamma = np.exp(log_gamma.astype(np.float64)).astype(np.float32).reshape(-1)
    return _Chunk(q[0], k[0], v[0], state, after, o.outputs[0], gamma)


def _first(values: Sequence[ir.Value] | None) -> ir.Value | None:
    return values[0] if values else None


def _second(values: Sequence[ir.Value] | None) -> ir.Value | None:
    return values[1] if values else None


def _one_each(graph: ir.Graph, length: ir.Value) -> ir.Value:
    """Whether every sequence reads one token, and there is no more: bool, of rank 0."""
    w = Inserter(graph, graph[0], "step")  # nodes are put in order at the end
    tokens = next(value for value in graph.inputs if value.name == "tokens")
    shape = w.op("Shape", tokens, name="chunk_list", dtype=ir.DataType.INT64, start=1, end=2)
    least = w.op("ReduceMin", length, name="least", dtype=ir.DataType.INT64, keepdims=0)
    chunk = w.reshape(shape, "chunk")
    product = w.op("Mul", least, chunk, name="least_times_chunk", dtype=ir.DataType.INT64)
    return w.op("Equal", product, w.initializer(np.array(1, np.int64), "int_1"), name="one_each", dtype=ir.DataType.BOOL)


def _branch(graph: ir.Graph, chunk: _Chunk, condition: ir.Value) -> None:
    o, after = chunk.o, chunk.state_after
    last = o.producer()
    assert last is not None
    scope, nodes = scope_of(last), chunk.nodes
    branch = ir.node("If", [condition], num_outputs=2, name=f"{scope}.one_or_chunk")
    graph.insert_before(nodes[0], branch)
    graph.remove(nodes)
    before = set(graph)
    w = Inserter(graph, branch, f"{scope}.one")
    read, state_after = attend(w, chunk.q, chunk.k, chunk.v, chunk.state, chunk.gamma)
    read = w.reshape(read, "o", 0, 1, len(chunk.gamma), size_of(chunk.state, 3))
    # What all layers share stays outside.
    step = [node for node in graph if node not in before and (node.name or "").startswith(f"{scope}.one.")]
    graph.remove(step)
    result, state = branch.outputs
    result.name, result.type = f"{scope}.o_of_one_or_chunk", ir.TensorType(ir.DataType.FLOAT)
    substitute(o, result)
    substitute(after, state)
    for name, outputs, inside in (("then_branch", (read, state_after), step), ("else_branch", (o, after), nodes)):
        branch.attributes[name] = ir.AttrGraph(name, ir.Graph([], outputs, nodes=inside, name=f"{scope}.{name}"))
