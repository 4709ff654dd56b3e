"""Small tools for rewrites: who made a value, from what, and how to put something else in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is a standard operator of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def inputs_of(value: ir.Value | None, op_type: str) -> tuple[ir.Value, ...] | None:
    """The inputs of the node that computes `value`, if it is of this type and all of them are there."""
    node = made_by(value, op_type)
    if node is None or any(each is None for each in node.inputs):
        return None
    return tuple(each for each in node.inputs if each is not None)


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The contents of an initializer."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def number(value: ir.Value | None) -> float | None:
    """The one element of an initializer of one element."""
    array = constant(value) if value is not None and value.const_value is not None and value.const_value.size == 1 else None
    return None if array is None else float(array.reshape(()))


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only node that reads `value`, if there is one, it is of this type, and `value` is no graph output."""
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def narrowed(value: ir.Value) -> tuple[ir.Value, ir.DataType] | None:
    """`value` as it was before it was cast up to float32, and its type then."""
    inputs = inputs_of(value, "Cast")
    node = value.producer()
    if inputs is None or node is None or node.attributes["to"].as_int() != ir.DataType.FLOAT or inputs[0].dtype is None:
        return None
    return inputs[0], inputs[0].dtype


@dataclass(frozen=True)
class Writer:
    """Writes nodes in front of an existing one, named after it.

    Attributes:
        graph: the graph under rewriting.
        before: new nodes are placed before this one, in the order they are written.
        scope: prefix of names.
    """

    graph: ir.Graph
    before: ir.Node
    scope: str

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str, dtype: ir.DataType, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Write a node with one output of the element type `dtype`."""
        return self.op_n(op_type, *inputs, names=[name], dtypes=[dtype], domain=domain, **attributes)[0]

    def op_n(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        names: Sequence[str],
        dtypes: Sequence[ir.DataType],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Write a node; an output called "" is left out."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=len(names), name=f"{self.scope}.{names[0]}")
        for value, name, dtype in zip(node.outputs, names, dtypes, strict=True):
            value.name = f"{self.scope}.{name}" if name else ""
            value.type = ir.TensorType(dtype)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        self.graph.insert_before(self.before, node)
        return tuple(node.outputs)

    def cast(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return self.op("Cast", value, name=name, dtype=to, to=to)

    def reshape(self, value: ir.Value, name: str, *sizes: int) -> ir.Value:
        """0 keeps the input's size."""
        assert value.dtype is not None
        shape = self.initializer(np.array(sizes, np.int64), "shape_" + "x".join(str(size).replace("-1", "any") for size in sizes))
        return self.op("Reshape", value, shape, name=name, dtype=value.dtype)

    def initializer(self, array: NDArray[np.generic], name: str) -> ir.Value:
        """A constant of the graph; the second request for a name returns the first value."""
        if name not in self.graph.initializers:
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def scope_of(node: ir.Node) -> str:
    """The scope a node was written in: its name without the last part."""
    return (node.name or "").rpartition(".")[0] or "graph"


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, a graph output included, read `new`, which takes over name and shape of an output."""
    if old.is_graph_output():
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def size_of(value: ir.Value, axis: int) -> int:
    """A fixed size of a value's shape."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
