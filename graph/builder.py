"""A thin builder over onnx-ir: nodes get the names of the scope they are written in, constants are shared.

A node's name is its scope and its role, `layers.3.retention.decay`, and so is the name of its first output; that is what a
reader sees in Netron and what an error of a parser names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Value = ir.Value


class GraphBuilder:
    """Collects nodes in the order they are written.

    Args:
        name: the graph's name.
        opset: version of the default operator set.
    """

    def __init__(self, name: str, opset: int) -> None:
        self.name, self.opset = name, opset
        self._scope: list[str] = []
        self._nodes: list[ir.Node] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._initializers: dict[str, Value] = {}
        self._taken: set[str] = set()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything written in the block."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def qualify(self, name: str) -> str:
        """The full name of `name` in the current scope."""
        return ".".join([*self._scope, name])

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> Value:
        """Declare a graph input."""
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        self._taken.add(name)
        return value

    def output(self, value: Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a value as a graph output, which renames it."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: Value | None, name: str, domain: str = "", **attributes: Any) -> Value:
        """Write a node with one output."""
        return self.op_n(op_type, *inputs, names=[name], domain=domain, **attributes)[0]

    def op_n(
        self, op_type: str, *inputs: Value | None, names: Sequence[str], domain: str = "", **attributes: Any
    ) -> tuple[Value, ...]:
        """Write a node with several outputs, each named; the first name is the node's."""
        full = [self._unique(name) for name in names]
        node = ir.node(op_type, inputs=list(inputs), attributes=attributes, domain=domain, num_outputs=len(full), name=full[0])
        for value, value_name in zip(node.outputs, full, strict=True):
            value.name = value_name
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, array: NDArray[np.generic] | Sequence[int], name: str) -> Value:
        """A constant kept inside the ONNX file; equal constants of one name are one."""
        array = np.asarray(array, np.int64) if not isinstance(array, np.ndarray) else array
        return self.initializer(ir.Tensor(array, name=name))

    def scalar(self, value: float, name: str) -> Value:
        """A float32 constant of rank 0."""
        return self.constant(np.array(value, np.float32), name)

    def shape(self, *sizes: int) -> Value:
        """A constant for Reshape; 0 keeps the input's size."""
        return self.constant(np.array(sizes, np.int64), "shape_" + "x".join(str(size).replace("-1", "any") for size in sizes))

    def axes(self, *axes: int) -> Value:
        """A constant list of axes."""
        return self.constant(np.array(axes, np.int64), "axes_" + "_".join(str(axis).replace("-", "minus") for axis in axes))

    def initializer(self, tensor: ir.TensorProtocol) -> Value:
        """A tensor as a graph initializer; the second request for a name returns the first value."""
        name = tensor.name
        assert name is not None
        if name not in self._initializers:
            self._initializers[name] = ir.val(name, const_value=tensor)
            self._taken.add(name)
        return self._initializers[name]

    def model(self, doc: str) -> ir.Model:
        """The finished model."""
        domains = {node.domain for node in self._nodes if node.domain}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            name=self.name,
            opset_imports={"": self.opset} | dict.fromkeys(domains, 1),
            doc_string=doc,
        )
        return ir.Model(graph, ir_version=10, producer_name="retnet-export")

    def _unique(self, name: str) -> str:
        full = self.qualify(name)
        if full in self._taken:
            raise ValueError(f"two nodes are called {full!r}: give each its own name within its scope")
        self._taken.add(full)
        return full
