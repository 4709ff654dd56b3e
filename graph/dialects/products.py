"""Products with quantized weights as `com.microsoft::MatMulNBits`.

Rule: `DequantizeLinear` of a blocked INT4 or INT8 weight, read by one MatMul, becomes one operator over the same numbers,
repacked: (inputs, outputs) signed in blocks along axis 0 becomes (outputs, blocks, bytes) unsigned, whose zero is 8 or 128.
A weight is repacked when the model is saved, one at a time.

    W (K, N) int4 ─ DequantizeLinear(scale (K/block, N)) ─┐
                                             x ─ MatMul ──┘     ->     x ─ MatMulNBits(B (N, K/block, block/2), scale)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.dialects.pattern import MICROSOFT, Writer, made_by, only_user, scope_of, substitute

BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}


class MatMulNBitsPass(ir.passes.InPlacePass):
    """Replace DequantizeLinear → MatMul where the weight is blocked along its inputs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            dequantize = made_by(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" and node.domain == "" else None
            if dequantize is None or only_user(dequantize.outputs[0], "MatMul") is not node or len(dequantize.inputs) != 2:
                continue
            weight, scale = dequantize.inputs
            block = dequantize.attributes.get_int("block_size", 0)
            bits = BITS.get(weight.dtype) if weight is not None and weight.dtype is not None else None
            if weight is None or scale is None or bits is None or not block or dequantize.attributes.get_int("axis", 1) != 0:
                continue
            if weight.const_value is None or scale.const_value is None or weight.shape is None:
                continue
            inputs, outputs = (int(str(size)) for size in weight.shape)
            if inputs % block:
                continue
            w = Writer(graph, node, scope_of(node))
            packed = _lazy(
                graph,
                f"{weight.name}.packed",
                ir.DataType.UINT8,
                (outputs, inputs // block, block * bits // 8),
                weight,
                _pack(bits),
            )
            scales = _lazy(graph, f"{scale.name}.by_output", scale.const_value.dtype, (outputs, inputs // block), scale, _transpose)
            product = w.op(
                "MatMulNBits",
                node.inputs[0],
                packed,
                scales,
                name="quantized_product",
                dtype=scale.const_value.dtype,
                domain=MICROSOFT,
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=block,
            )
            substitute(node.outputs[0], product)
            modified = True
        return ir.passes.PassResult(model, modified)


def pack_blocks(weight: NDArray[np.generic], block: int, bits: int) -> NDArray[np.uint8]:
    """Signed weights (K, N) as MatMulNBits stores them: uint8 (N, K/block, block·bits/8), two 4-bit numbers to a byte."""
    inputs, outputs = weight.shape
    unsigned = (weight.astype(np.int8).T.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    unsigned = unsigned.reshape(outputs, inputs // block, block)
    packed: NDArray[np.uint8] = unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << np.uint8(4))
    return packed


def _pack(bits: int):  # type: ignore[no-untyped-def]
    return lambda array, shape: pack_blocks(array, array.shape[0] // shape[1], bits)


def _transpose(array: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    return np.ascontiguousarray(array.T)


def _lazy(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], source: ir.Value, convert) -> ir.Value:  # type: ignore[no-untyped-def]
    """An initializer made from another when it is first needed."""
    if name not in graph.initializers:
        tensor = source.const_value
        assert tensor is not None
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(convert(tensor.numpy(), shape), name=name, dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        graph.register_initializer(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy))
    return graph.initializers[name]
