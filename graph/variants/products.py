"""Products with quantized weights as `com.microsoft::MatMulNBits`.

Rule: `DequantizeLinear` of an INT4 or INT8 weight, read by one MatMul, becomes one operator over the same numbers, repacked:
(inputs, outputs) signed becomes (outputs, blocks, bytes) unsigned, whose zero is 8 or 128. A weight with one scale for each
output gets that scale in every block; so does a tied head, whose rows are outputs already. A weight is repacked when the model
is saved, one at a time.

    W (K, N) int4 ─ DequantizeLinear(scale (K/block, N)) ─┐
                                             x ─ MatMul ──┘     ->     x ─ MatMulNBits(B (N, K/block, block/2), scale)

    E (V, D) int8 ─ DequantizeLinear(scale (V)) ─ Transpose ─┐
                                             x ─ MatMul ─────┘  ->     x ─ MatMulNBits(B (V, D/32, 32), scale, D/32 times)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import MICROSOFT, constant, made_by, only_user, scope_of, substitute

BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}
BLOCK_OF_OUTPUT = 32
"""The block for weights with one scale for each output: the size that ONNX Runtime's tensor-core kernels take."""


@dataclass(frozen=True)
class _Weight:
    """A quantized weight as one MatMul reads it.

    Attributes:
        values: integers (K, N), or (N, K) if `by_output`.
        scale: (K/block, N), or (N,) for one scale for each output.
        block: inputs that share a scale in the new operator.
        by_output: whether a row of `values` is an output.
    """

    values: ir.Value
    scale: ir.Value
    block: int
    by_output: bool

    @property
    def bits(self) -> int:
        assert self.values.dtype is not None
        return BITS[self.values.dtype]

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        assert self.values.shape is not None
        rows, columns = (int(str(size)) for size in self.values.shape)
        return (columns, rows) if self.by_output else (rows, columns)

    def packed(self, values: NDArray[np.generic]) -> NDArray[np.uint8]:
        return pack_blocks(values.T if self.by_output else values, self.block, self.bits)

    def scales(self, scale: NDArray[np.generic]) -> NDArray[np.generic]:
        """(N, K/block)."""
        return np.ascontiguousarray(scale.T if scale.ndim == 2 else np.repeat(scale[:, None], self.sizes[0] // self.block, 1))


class MatMulNBitsPass(ir.passes.InPlacePass):
    """Replace products whose weight is dequantized for them alone."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            found = _match(node)
            if found is None:
                continue
            inputs, outputs = found.sizes
            dtype = found.scale.dtype
            assert dtype is not None
            blocks = inputs // found.block
            shape = (outputs, blocks, found.block * found.bits // 8)
            packed = _lazy(graph, f"{found.values.name}.packed", ir.DataType.UINT8, shape, found.values, found.packed)
            scales = _lazy(graph, f"{found.scale.name}.by_output", dtype, (outputs, blocks), found.scale, found.scales)
            product = Inserter(graph, node, scope_of(node)).op(
                "MatMulNBits",
                node.inputs[0],
                packed,
                scales,
                name=f"{(node.name or 'product').rpartition('.')[2]}.quantized",
                dtype=dtype,
                domain=MICROSOFT,
                K=inputs,
                N=outputs,
                bits=found.bits,
                block_size=found.block,
            )
            substitute(node.outputs[0], product)
            modified = True
        return ir.passes.PassResult(model, modified)


def _match(node: ir.Node) -> _Weight | None:
    if node.op_type != "MatMul" or node.domain != "":
        return None
    turned = made_by(node.inputs[1], "Transpose")
    dequantize = made_by(node.inputs[1] if turned is None else turned.inputs[0], "DequantizeLinear")
    if dequantize is None or only_user(dequantize.outputs[0], "MatMul" if turned is None else "Transpose") is None:
        return None
    if turned is not None and only_user(turned.outputs[0], "MatMul") is None:
        return None
    values, scale, *zero_point = dequantize.inputs
    if values is None or scale is None or values.dtype not in BITS or values.shape is None or scale.shape is None:
        return None
    zeros = constant(zero_point[0]) if zero_point else np.zeros(1)
    if zeros is None or zeros.any():
        return None
    if values.const_value is None or scale.const_value is None:
        return None
    # Blocks lie along the inputs, single scales along the outputs: axes 0 and 1, and the other way round in a tied head.
    one_a_row = len(scale.shape) == 1
    inputs_axis = 0 if turned is None else 1
    expected_axis = 1 - inputs_axis if one_a_row else inputs_axis
    if dequantize.attributes.get_int("axis", 1) != expected_axis or (turned is not None and not one_a_row):
        return None
    block = BLOCK_OF_OUTPUT if one_a_row else dequantize.attributes.get_int("block_size", 0)
    found = _Weight(values, scale, block, by_output=turned is not None)
    return found if block and found.sizes[0] % block == 0 else None


def pack_blocks(weight: NDArray[np.generic], block: int, bits: int) -> NDArray[np.uint8]:
    """Signed weights (K, N) as MatMulNBits stores them: uint8 (N, K/block, block·bits/8), two 4-bit numbers to a byte."""
    inputs, outputs = weight.shape
    unsigned = (weight.astype(np.int8).T.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    unsigned = unsigned.reshape(outputs, inputs // block, block)
    packed: NDArray[np.uint8] = unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << np.uint8(4))
    return packed


def _lazy(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    source: ir.Value,
    convert: Callable[[NDArray[np.generic]], NDArray[np.generic]],
) -> ir.Value:
    """An initializer made from another when it is first needed."""
    if name not in graph.initializers:
        tensor = source.const_value
        assert tensor is not None
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(convert(tensor.numpy()), name=name, dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        graph.register_initializer(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy))
    return graph.initializers[name]
