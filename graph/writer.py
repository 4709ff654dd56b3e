"""What every block of a graph is written with: the graph, the weights and their file, the number format.

The residual stream is float32 whatever the compute format: only the operands of matrix products are cast down, and their results
are cast up once (style: accumulate wide, cast once, visibly).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.builder import GraphBuilder, Value
from retnet_export.graph.element_types import onnx_type
from retnet_export.graph.weights import Array, ReadWeight, narrowed, weight_shapes
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.runtime.bundle.config import ModelConfig


@dataclass(frozen=True)
class Writer:
    """The context of every block: the graph for nodes, the source and file of weights, and the format.

    Attributes:
        b: the graph under construction.
        config: the architecture.
        read: reads a canonical weight.
        file: the bundle's weights file.
        compute: element type of stored matrices and of the operands of matrix products.
        lead: the leading axes of an activation as Reshape writes them: (0,) in decode, (0, 0) in prefill.
    """

    b: GraphBuilder
    config: ModelConfig
    read: ReadWeight
    file: WeightsFile
    compute: str
    lead: tuple[int, ...]

    @property
    def compute_type(self) -> ir.DataType:
        return onnx_type(self.compute)

    def cast_down(self, x: Value, name: str) -> Value:
        """float32 -> the compute format."""
        return x if self.compute == "float32" else self.b.op("Cast", x, name=f"{name}.cast", to=self.compute_type)

    def cast_up(self, x: Value, name: str) -> Value:
        """The compute format -> float32."""
        return x if self.compute == "float32" else self.b.op("Cast", x, name=f"{name}.float32", to=ir.DataType.FLOAT)

    def float32(self, name: str) -> Array:
        """A canonical weight in float32."""
        return narrowed(name, self.read(name), np.dtype(np.float32))

    def vector(self, name: str, shape: tuple[int, ...] = (-1,)) -> Value:
        """A canonical vector (norm weight, bias), always float32."""
        return self.b.initializer(self.file.tensor(name, lambda: self.float32(name).reshape(shape)))

    def table(self) -> Value:
        """The embedding, (V, D), in the compute format."""
        return self.b.initializer(self.file.tensor("embedding.weight", lambda: self._stored("embedding.weight")))

    def matrix(self, name: str, parts: Sequence[str], *, order: NDArray[np.int64] | None = None) -> Value:
        """Canonical matrices (outputs, inputs), transposed to (inputs, outputs) and joined along the outputs.

        Args:
            name: the joined tensor's name.
            parts: canonical names.
            order: a permutation of the joined outputs.
        """

        def make() -> Array:
            return transposed([self._stored(part) for part in parts], order)

        return self.b.initializer(self.file.tensor(name, make))

    def _stored(self, name: str) -> NDArray[np.generic]:
        return narrowed(name, self.read(name), self.compute_type.numpy())

    def product(self, x: Value, weight: Value, name: str, bias: Value | None = None) -> Value:
        """x (…, inputs) float32 times weight (inputs, outputs): float32 (…, outputs)."""
        y = self.cast_up(self.b.op("MatMul", self.cast_down(x, name), weight, name=name), name)
        return y if bias is None else self.b.op("Add", y, bias, name=f"{name}.biased")

    def linear(self, x: Value, name: str) -> Value:
        """One canonical linear layer; its name is the current scope and `name`."""
        full = self.b.qualify(name)
        bias = self.vector(f"{full}.bias") if f"{full}.bias" in self.shapes else None
        return self.product(x, self.matrix(f"{full}.weight", [f"{full}.weight"]), name, bias)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return weight_shapes(self.config)

    def reshape(self, x: Value, name: str, *sizes: int) -> Value:
        """Split the last axis: (lead…, sizes…)."""
        return self.b.op("Reshape", x, self.b.shape(*self.lead, *sizes), name=name)


def transposed(matrices: Sequence[Array], order: NDArray[np.int64] | None = None, tile: int = 128) -> Array:
    """The rows of matrices (outputs, inputs), one matrix after another or in the order given, as columns: (inputs, outputs).

    A tile of rows at a time: a cache line then serves many columns, which is about five times as fast for a large matrix, and
    the matrices need not be joined first.
    """
    starts = np.cumsum([0, *(len(matrix) for matrix in matrices)])
    order = np.arange(starts[-1]) if order is None else order
    result: Array = np.empty((matrices[0].shape[1], starts[-1]), matrices[0].dtype)
    for first in range(0, len(order), tile):
        rows = order[first : first + tile]
        for matrix, start in zip(matrices, starts[:-1], strict=True):
            here = (rows >= start) & (rows < start + len(matrix))
            if here.all():
                result[:, first : first + tile] = matrix[rows - start].T
            elif here.any():
                result[:, first : first + tile][:, here] = matrix[rows[here] - start].T
    return result
