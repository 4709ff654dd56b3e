"""New nodes in a graph that is rewritten: each is named after the place that it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True)
class Inserter:
    """Writes nodes in front of an existing one, named after it.

    Attributes:
        graph: the graph under rewriting.
        before: new nodes are placed before this one, in the order they are written; None: at the end.
        scope: prefix of names.
    """

    graph: ir.Graph
    before: ir.Node | None
    scope: str

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Write a node with one output, of the element type `dtype` if it is known."""
        return self.op_n(op_type, *inputs, names=[name], dtypes=[dtype], domain=domain, **attributes)[0]

    def op_n(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        names: Sequence[str],
        dtypes: Sequence[ir.DataType | None],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Write a node; an output called "" is left out."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=len(names), name=f"{self.scope}.{names[0]}")
        for value, name, dtype in zip(node.outputs, names, dtypes, strict=True):
            value.name = f"{self.scope}.{name}" if name else ""
            value.type = None if dtype is None else ir.TensorType(dtype)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        if self.before is None:
            self.graph.append(node)
        else:
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
        return self.tensor(ir.Tensor(array, name=name))

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """The same for a tensor that has a name, and may lie in a file."""
        assert tensor.name is not None
        if tensor.name not in self.graph.initializers:
            self.graph.register_initializer(ir.val(tensor.name, const_value=tensor))
        return self.graph.initializers[tensor.name]
