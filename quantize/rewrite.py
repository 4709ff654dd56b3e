"""The rewrite: float matrices of a bundle's graphs become integers and `DequantizeLinear`, standard ONNX, opset 21.

    before   x ── MatMul ── y              after   x ───────────────────── MatMul ── y
    W (K, N) ──┘                           W.int4 (K, N) ─ DequantizeLinear ─┘
                                           W.scale (K/g, N) ──┘

    before   x ── Gemm(transB) ── y        after   x ───────────────────────────────── MatMul ── y
    E (V, D) ──┘                           E.int8 (V, D) ─ DequantizeLinear ─ Transpose ─┘
                                           E.scale (V) ──────┘

    before   E (V, D) ── Gather            after   rows of E as 32-bit words ─ Gather ─ digits ─ · scale
    token ─────────┘                       token ──────────────────────────────┘

ONNX Runtime fuses the first two into MatMulNBits; TensorRT keeps the integers. For the embedding no other form suits both:
TensorRT takes no integer constant but before DequantizeLinear, and ONNX Runtime would dequantize all V rows for one token.
So Gather reads 32-bit words, which are the same bytes as the int8 rows: a tied embedding stays one copy in the file.

Quantized activations are a pair of nodes before the product, which TensorRT makes one 8-bit product of:

    x ── MatMul ── y      ->      x ── QuantizeLinear ── DequantizeLinear ── MatMul ── y
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import name_of
from retnet_export.quantize.formats import Format, stored_scales
from retnet_export.quantize.options import Role

OPSET = 21
"""The first with four-bit integers and blocked DequantizeLinear."""


@dataclass(frozen=True)
class StoredMatrix:
    """References into the weights file for one quantized matrix: what a product reads, what Gather reads, or both if tied.

    Attributes:
        format: its format.
        values: integers, (K, N); of a tied embedding (V, D).
        scales: (N,), or (K/g, N) in blocks; of a tied embedding (V,).
        words: an embedding's rows as int32, (V, D·bits/32, 1); of a tied one the bytes of `values`.
        row_scales: an embedding's scales, (V, 1), or (V, D/g, 1) in blocks; of a tied one the bytes of `scales`.
    """

    format: Format
    values: ir.ExternalTensor | None = None
    scales: ir.ExternalTensor | None = None
    words: ir.ExternalTensor | None = None
    row_scales: ir.ExternalTensor | None = None


def matrices(model: ir.Model) -> dict[str, Role]:
    """The matrices that can be quantized, by initializer name, in the order the graph meets them."""
    found: dict[str, Role] = {}
    for node in model.graph:
        for name in _matrix_names(node):
            role: Role = "embedding" if node.op_type == "Gather" else "head" if node.name == "head" else "weights"
            found[name] = "tied" if {found.get(name), role} == {"embedding", "head"} else role
    return found


def _matrix_names(node: ir.Node) -> Sequence[str]:
    position = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
    value = None if position is None else node.inputs[position]
    if value is None or not isinstance(value.const_value, ir.ExternalTensor) or len(value.const_value.shape) != 2:
        return ()
    assert value.name is not None
    return (value.name,)


def products(model: ir.Model) -> dict[str, str]:
    """The nodes that multiply by a matrix of the weights file, and the initializer's name of that matrix."""
    return {name_of(node): name for node in model.graph if node.op_type != "Gather" for name in _matrix_names(node)}


def quantize_graph(model: ir.Model, stored: Mapping[str, StoredMatrix], activations: Mapping[str, float] | None = None) -> None:
    """Replace the float matrices named in `stored` by their integers, in place.

    What flows into the products that `activations` names is quantized in the format of their matrix; the value is the largest
    magnitude.
    """
    model.graph.opset_imports[""] = max(OPSET, model.graph.opset_imports[""])
    rewriter = _Rewriter(model.graph, stored)
    for node in list(model.graph):
        for name in _matrix_names(node):
            if name in stored:
                if name_of(node) in (activations or {}):
                    rewriter.quantize_input(node, name, (activations or {})[name_of(node)])
                rewriter.replace(node, name)
    for name in stored:
        model.graph.initializers.pop(name, None)


class _Rewriter:
    """Nodes and initializers added to one graph; a matrix that two nodes read is dequantized once."""

    def __init__(self, graph: ir.Graph, stored: Mapping[str, StoredMatrix]) -> None:
        self._graph, self._stored = graph, stored
        self._dequantized: dict[str, ir.Value] = {}

    def replace(self, node: ir.Node, name: str) -> None:
        if node.op_type == "Gather":
            self._replace_gather(node, name)
        elif node.op_type == "Gemm":
            self._replace_gemm(node, name)
        else:
            node.replace_input_with(1, self._weight(node, name))
            self._keep_apart(node)

    def quantize_input(self, node: ir.Node, name: str, largest: float) -> None:
        """Let what flows into a product pass through the format of its matrix: one scale, since rows come one at a time."""
        form, x = self._stored[name].format, node.inputs[0]
        scale = stored_scales(np.array(largest / form.magnitude), form).astype(form.scale_dtype)
        w = Inserter(self._graph, node, name_of(node))
        # Explicit, because the default is uint8.
        grid = [
            w.initializer(scale, f"{node.name}.input_scale"),
            w.initializer(np.zeros((), form.dtype), f"{node.name}.input_zero_point"),
        ]
        rounded = w.op("QuantizeLinear", x, *grid, name=f"input_{form.name}")
        node.replace_input_with(0, w.op("DequantizeLinear", rounded, *grid, name="input"))

    def _keep_apart(self, product: ir.Node) -> None:
        """Let Sum, not Add, add to a product: ONNX Runtime would make a Gemm of both, whose quantized weights it does not fuse."""
        users = list(product.outputs[0].consumers())
        if len(users) == 1 and users[0].op_type == "Add":
            self._take_over(users[0], "Sum", users[0].inputs)

    def _weight(self, before: ir.Node, name: str) -> ir.Value:
        """W as floats, (K, N), from a DequantizeLinear that stands before the node `before`."""
        if name not in self._dequantized:
            stored = self._stored[name]
            assert stored.values is not None
            assert stored.scales is not None
            w = Inserter(self._graph, before, name)
            inputs = [w.tensor(stored.values), w.tensor(stored.scales)]
            # A scale for each row or column lies along the other axis than the blocks, which follow the inputs.
            attributes = {"axis": 1} if len(stored.scales.shape) == 1 else {"axis": 0, "block_size": stored.format.group_size}
            self._dequantized[name] = w.op("DequantizeLinear", *inputs, name="dequantized", **attributes)
        return self._dequantized[name]

    def _replace_gemm(self, node: ir.Node, name: str) -> None:
        """x · Eᵀ for the tied head: rows of E are outputs, so its scales lie along axis 0."""
        stored = self._stored[name]
        assert stored.values is not None
        assert stored.scales is not None
        w = Inserter(self._graph, node, name)
        # Explicit zeros: before 1.28 ONNX Runtime carries the quantization over the Transpose, and guesses uint8 without them.
        zeros = w.initializer(np.zeros(stored.scales.shape.numpy(), np.int8), f"{name}.zero_point")
        rows = w.op("DequantizeLinear", w.tensor(stored.values), w.tensor(stored.scales), zeros, name="dequantized", axis=0)
        columns = w.op("Transpose", rows, name="transposed", perm=[1, 0])
        self._take_over(node, "MatMul", [node.inputs[0], columns])

    def _replace_gather(self, node: ir.Node, name: str) -> None:
        """Rows of the table for `tokens`, from words of 32 bits: each word holds 4 int8 or 8 int4, lowest first.

        A digit is (word mod 2^(bits·(i+1))) div 2^(bits·i), in int64 and so never negative; the table of digits knows which of
        them stand for negative values.
        """
        stored, tokens = self._stored[name], node.inputs[1]
        assert stored.words is not None
        assert stored.row_scales is not None
        assert tokens is not None
        bits, lanes = stored.format.bits, 32 // stored.format.bits
        lane = np.arange(lanes, dtype=np.int64)
        digits = np.arange(1 << bits)
        values = np.where(digits > stored.format.magnitude, digits - (1 << bits), digits).astype(stored.format.scale_dtype)
        lead = [0] * _rank(tokens)
        width = stored.words.shape.numpy()[1] * lanes
        group = stored.format.group_size

        w = Inserter(self._graph, node, name_of(node))

        def constant(array: NDArray[np.generic], role: str) -> ir.Value:
            return w.initializer(array, f"{node.name}.{role}")

        words = w.op("Gather", w.tensor(stored.words), tokens, name="words", axis=0)
        wide = w.op("Cast", words, name="words_int64", to=ir.DataType.INT64)
        low = w.op("Mod", wide, constant(1 << (bits * (lane + 1)), "above_lane"), name="low_bits")
        digit = w.op("Div", low, constant(1 << (bits * lane), "lane"), name="digits")
        value = w.op("Gather", constant(values, "value_of_digit"), digit, name="digit_values", axis=0)
        blocks = [*lead, width] if group is None else [*lead, width // group, group]
        row = w.op("Reshape", value, constant(np.array(blocks), "row_blocks"), name="row")
        scale = w.op("Gather", w.tensor(stored.row_scales), tokens, name="row_scale", axis=0)
        if group is None:
            self._take_over(node, "Mul", [row, scale])
            return
        scaled = w.op("Mul", row, scale, name="row_scaled")
        self._take_over(node, "Reshape", [scaled, constant(np.array([*lead, width]), "row_shape")])

    def _take_over(self, old: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]) -> None:
        """Replace `old` by a node of another type with the same name and output."""
        output, name = old.outputs[0], old.outputs[0].name
        node = ir.node(op_type, inputs=list(inputs), name=old.name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, output.type, output.shape
        self._graph.insert_before(old, node)
        output.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        self._graph.remove(old, safe=True)


def _rank(value: ir.Value) -> int:
    """How many axes the token ids have where the embedding reads them: decode squeezes them, prefill clips them."""
    if value.shape is not None:
        return len(value.shape)
    producer = value.producer()
    if producer is not None and producer.op_type == "Squeeze":
        tokens, axes = producer.inputs
        assert tokens is not None
        assert axes is not None
        assert axes.const_value is not None
        return _rank(tokens) - int(axes.const_value.size)
    if producer is not None and producer.op_type in ("Min", "Max") and producer.inputs[0] is not None:
        return _rank(producer.inputs[0])
    raise ValueError(f"{value.name}: cannot tell the rank of the embedding's input")
