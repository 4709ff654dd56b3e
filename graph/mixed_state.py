"""A mixed state: heads that forget fast are stored in float16, those that remember long in float32.

Rule: a float16 state holds a head that remembers at most `LONGEST_HALF_PRECISION_MEMORY` tokens; of slower heads roundings no
longer cancel (docs/quantization.md, State). Heads stand from the fastest decay to the slowest, so a layer's state is two
tensors, and its heads side by side are what every other state is. The update stays float32.

    decode   state.i.fast ─ Cast ─ ·γ ─ + k·v ─┬─ Cast ─ state.i.fast_out      q· ─┐
                                               └───────────────────────────────────┤
             state.i.slow ─────── ·γ ─ + k·v ─┬─ state.i.slow_out              q· ─┴─ Concat ─ o
                                              └────────────────────────────────────┘
    prefill  both joined before, and cut after, once a chunk
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from retnet_export.graph.retnet import slow_heads
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import UserError


@dataclass(frozen=True)
class _Part:
    """Heads of a layer that are stored alike: name, first head, how many, and their element type."""

    name: str
    first: int
    heads: int
    dtype: ir.DataType


def check_mixed_state(config: ModelConfig) -> None:
    """Refuse a mixed state for heads that are all fast or all slow.

    Raises:
        UserError: with the format to take instead.
    """
    slow = slow_heads(config)
    if slow in (0, config.num_heads):
        kind, instead = ("long", "fp16") if slow == 0 else ("short", "fp32")
        raise UserError(f"--state mixed: no head of this model remembers too {kind} for {instead}; use --state {instead}")


def mix_state(model: ir.Model, config: ModelConfig) -> None:
    """Let a portable decode or prefill graph with a float32 state store its fast heads in float16; in place."""
    slow = slow_heads(config)
    fast = config.num_heads - slow
    parts = (_Part("fast", 0, fast, ir.DataType.FLOAT16), _Part("slow", fast, slow, ir.DataType.FLOAT))
    nodes = {node.name: node for node in model.graph if node.name}
    for layer in range(config.num_layers):
        _mix_layer(model.graph, nodes, config, parts, layer)


def _mix_layer(graph: ir.Graph, nodes: Mapping[str, ir.Node], config: ModelConfig, parts: Sequence[_Part], layer: int) -> None:
    place = f"layers.{layer}.retention"
    old = next(value for value in graph.inputs if value.name == f"state.{layer}")
    assert old.shape is not None
    shapes = [ir.Shape([old.shape[0], part.heads, config.head_key_dim, config.head_value_dim]) for part in parts]
    inputs = [
        ir.Value(name=f"state.{layer}.{part.name}", type=ir.TensorType(part.dtype), shape=shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
    after = nodes[f"{place}.state_after"]
    in_prefill = f"{place}.read_state" in nodes
    change = _split_prefill if in_prefill else _split_decode
    states = change(graph, nodes, place, parts, inputs, old)
    place_in = next(index for index, value in enumerate(graph.inputs) if value is old)
    place_out = next(index for index, value in enumerate(graph.outputs) if value.name == f"state.{layer}_out")
    graph.outputs.pop(place_out)
    if in_prefill:
        after.outputs[0].name = f"{place}.state_after"
    else:
        graph.remove([nodes[f"{place}.{name}"] for name in ("read", "state_after", "decayed", "key_value")], safe=True)
    graph.inputs.pop(place_in)
    for offset, (part, state, value, shape) in enumerate(zip(parts, states, inputs, shapes, strict=True)):
        if part.dtype != ir.DataType.FLOAT:
            state = _Nodes(graph, None, f"{place}.{part.name}").op("Cast", state, name="state_stored", to=part.dtype)
        state.name, state.type, state.shape = f"{value.name}_out", ir.TensorType(part.dtype), shape
        graph.inputs.insert(place_in + offset, value)
        graph.outputs.insert(place_out + offset, state)


def _split_decode(
    graph: ir.Graph,
    nodes: Mapping[str, ir.Node],
    place: str,
    parts: Sequence[_Part],
    inputs: Sequence[ir.Value],
    old: ir.Value,
) -> list[ir.Value]:
    """Update and read each part by itself, so that nothing of the state's size is joined or cut; gives the new states."""
    decayed, key_value, read = (nodes[f"{place}.{name}"] for name in ("decayed", "key_value", "read"))
    gamma = decayed.inputs[1]
    assert gamma is not None
    assert gamma.const_value is not None
    whole = _Nodes(graph, read, place)
    operands = [
        whole.split(value, name, parts)
        for value, name in ((read.inputs[0], "q_row"), (key_value.inputs[0], "k_column"), (key_value.inputs[1], "v_row"))
    ]
    states, reads = [], []
    for part, value, q, k, v in zip(parts, inputs, *operands, strict=True):
        w = _Nodes(graph, read, f"{place}.{part.name}")
        kept = w.constant(gamma.const_value.numpy()[part.first : part.first + part.heads], f"gamma.{part.name}")  # (h, Dk, 1)
        new = w.op(
            "Add",
            w.op("Mul", w.as_float32(value, part), kept, name="decayed"),
            w.op("Mul", k, v, name="key_value"),
            name="state_after",
        )
        states.append(new)
        reads.append(w.op("MatMul", q, new, name="read"))
    read.outputs[0].replace_all_uses_with(whole.op("Concat", *reads, name="reads", axis=1))
    return states


def _split_prefill(
    graph: ir.Graph,
    nodes: Mapping[str, ir.Node],
    place: str,
    parts: Sequence[_Part],
    inputs: Sequence[ir.Value],
    old: ir.Value,
) -> list[ir.Value]:
    """Join the parts before a chunk and cut them after it; gives the new states."""
    first = graph.node(0)
    states = [
        _Nodes(graph, first, f"{place}.{part.name}").as_float32(value, part) for part, value in zip(parts, inputs, strict=True)
    ]
    old.replace_all_uses_with(_Nodes(graph, first, place).op("Concat", *states, name="state_joined", axis=1))
    return list(_Nodes(graph, None, place).split(nodes[f"{place}.state_after"].outputs[0], "state_after", parts))


class _Nodes:
    """Writes nodes before one node of a graph, or at its end, under a prefix."""

    def __init__(self, graph: ir.Graph, before: ir.Node | None, prefix: str) -> None:
        self._graph, self._before, self._prefix = graph, before, prefix

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, **attributes: Any) -> ir.Value:
        return self._node(op_type, inputs, [name], attributes)[0]

    def as_float32(self, value: ir.Value, part: _Part) -> ir.Value:
        return value if part.dtype == ir.DataType.FLOAT else self.op("Cast", value, name="state_float32", to=ir.DataType.FLOAT)

    def split(self, value: ir.Value | None, name: str, parts: Sequence[_Part]) -> Sequence[ir.Value]:
        """The heads, axis 1, of each part."""
        sizes = self.constant(np.array([part.heads for part in parts]), "heads_of_parts")
        return self._node("Split", (value, sizes), [f"{part.name}.{name}" for part in parts], {"axis": 1})

    def constant(self, array: np.ndarray[Any, Any], name: str) -> ir.Value:
        """A constant; the second request for a name returns the first value."""
        if name not in self._graph.initializers:
            tensor = ir.Tensor(array, name=name)
            self._graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            )
        return self._graph.initializers[name]

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], names: Sequence[str], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        full = [f"{self._prefix}.{name}" for name in names]
        node = ir.node(op_type, list(inputs), attributes=attributes, num_outputs=len(names), name=full[0])
        for value, name in zip(node.outputs, full, strict=True):
            value.name = name
        if self._before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._before, node)
        return node.outputs
