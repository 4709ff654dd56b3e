"""Small tools for rewrites: find the node and the inputs of a value, and replace it."""

from __future__ import annotations

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
