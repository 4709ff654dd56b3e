"""Small tools for rewrites: find the node and the inputs of a value, and replace it."""

from __future__ import annotations

from dataclasses import dataclass

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
class Int8Product:
    """A product of floats with an INT8 weight, symmetric, with one scale for each output.

    Attributes:
        x: what flows in, not quantized: activations that are rounded already must not be rounded twice.
        values: integers (K, N), or (N, K) if `by_output`.
        scale: (N,).
        by_output: whether a row of `values` is an output: the tied head.
    """

    x: ir.Value
    values: ir.Value
    scale: ir.Value
    by_output: bool


def int8_product(node: ir.Node) -> Int8Product | None:
    """The product that a node computes; None if it is another."""
    if node.op_type != "MatMul" or node.domain != "" or node.inputs[0] is None or made_by(node.inputs[0], "DequantizeLinear"):
        return None
    turned = made_by(node.inputs[1], "Transpose")
    dequantize = made_by(node.inputs[1] if turned is None else turned.inputs[0], "DequantizeLinear")
    if dequantize is None or dequantize.attributes.get_int("axis", 1) != (1 if turned is None else 0):
        return None
    values, scale, *zero_point = dequantize.inputs
    zeros = constant(zero_point[0]) if zero_point else np.zeros(1)
    if values is None or values.dtype != ir.DataType.INT8 or scale is None or scale.shape is None or len(scale.shape) != 1:
        return None
    return None if zeros is None or zeros.any() else Int8Product(node.inputs[0], values, scale, turned is not None)


def scope_of(node: ir.Node) -> str:
    """The scope a node was written in: its name without the last part."""
    return (node.name or "").rpartition(".")[0] or "graph"


def name_of(named: ir.Node | ir.Value | None) -> str:
    """The name of a node or value that is there and has one."""
    assert named is not None
    assert named.name is not None
    return named.name


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
