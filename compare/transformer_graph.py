"""The baseline as an ONNX graph: one file for prefill and decode, its KV cache pre-allocated and updated in place.

    x (B, T, D) ─ norm ─ qkv ─ GroupQueryAttention ─ out ─ + x ─ norm ─ SwiGLU ─ + x
                                │  rotary inside, past_{i}.key and present_{i}.key one buffer (B, N, capacity, head)

Embedding, norms, feed-forward and head are the RetNet's own blocks, so both models get the same fusions. Attention is ONNX
Runtime's GroupQueryAttention on the packed product of q, k and v: the operator that its own generation library uses.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.compare.transformer import TransformerConfig
from retnet_export.graph.blocks import feed_forward, joined_linear
from retnet_export.graph.builder import GraphBuilder, Value
from retnet_export.graph.element_types import onnx_type
from retnet_export.graph.retnet import OPSET, embed, logits, residual
from retnet_export.graph.weights import ReadWeight
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.graph.writer import Writer

Lengths = Literal["given", "mask"]
"""How the graph learns the lengths of its sequences: as two integer inputs, or from an attention mask (onnxruntime-genai)."""


def build_transformer(
    config: TransformerConfig,
    read: ReadWeight,
    file: WeightsFile,
    compute: str,
    capacity: int,
    *,
    lengths: Lengths = "given",
    cache_scale: float | None = None,
) -> ir.Model:
    """Write the graph.

    Inputs: `input_ids` int64 (B, T), the lengths, `past_key_values.{i}.key` and `.value` (B, KV, capacity, head).
    Outputs: `logits` float32 (B, 1, V) after the last token, `present.{i}.key` and `.value`. Names are those of
    onnxruntime-genai, so that it runs the same file.

    Args:
        read: reads a weight by the names of `transformer.weight_shapes`.
        compute: "float32" or "float16", of stored matrices and operands of products.
        capacity: the longest sequence, for the table of rotary angles.
        lengths: "given" adds the inputs `seqlens_k` int32 (B,), each length less one, and `total_sequence_length` int32 ();
            "mask" adds `attention_mask` int64 (B, length).
        cache_scale: the step of a cache of int8; the cache is in the compute format when None.
    """
    b = GraphBuilder("transformer", OPSET)
    w = Writer(b, config.shared_parts, read, file, compute, lead=(0, 0))
    tokens = b.input("input_ids", ir.DataType.INT64, ("batch", "tokens"))
    last_index, total = _lengths(b, lengths)
    cache_type = w.compute_type if cache_scale is None else ir.DataType.INT8
    cache_shape = ("batch", config.num_kv_heads, "cache", config.head_dim)
    caches = [
        tuple(b.input(f"past_key_values.{index}.{part}", cache_type, cache_shape) for part in ("key", "value"))
        for index in range(config.num_layers)
    ]
    cos, sin = (b.initializer(file.tensor(part, partial(_angles, config, capacity, compute, part))) for part in ("cos", "sin"))
    options: dict[str, object] = {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads, "do_rotary": 1}
    scales: list[Value | None] = []
    if cache_scale is not None:
        options |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        step = b.constant(np.array([cache_scale], np.float32), "cache_scale")
        scales = [None, None, None, step, step]  # after position_ids, attention_bias and head_sink, which are not used
    presents: list[tuple[Value, ...]] = []

    def attention(index: int, x: Value) -> Value:
        with b.scope("attention"):
            qkv = w.cast_down(joined_linear(w, x, "qkv", ("q", "k", "v")), "qkv_compute")
            key, value = caches[index]
            out, *present = b.op_n(
                "GroupQueryAttention",
                *(qkv, None, None, key, value, last_index, total, cos, sin, *scales),
                names=["attention", "present_key", "present_value"],
                domain="com.microsoft",
                **options,
            )
            presents.append(tuple(present))
            return w.linear(w.cast_up(out, "attention"), "out")

    x = embed(w, tokens)
    for index in range(config.num_layers):
        with b.scope(f"layers.{index}"):
            x = residual(w, x, "attention", partial(attention, index))
            x = residual(w, x, "ffn", partial(feed_forward, w))
    # Only the last token's logits are wanted: (B, T, D) -> (B, 1, D) before the head, as the RetNet's prefill does.
    x = b.op("Gather", x, b.constant(np.array([-1], np.int64), "last"), name="last_token", axis=1)
    b.output(logits(w, x), "logits", ir.DataType.FLOAT, ("batch", 1, config.vocab_size))
    for index, present in enumerate(presents):
        for value, part in zip(present, ("key", "value"), strict=True):
            b.output(value, f"present.{index}.{part}", cache_type, cache_shape)
    return b.model(f"KV-cache Transformer, {config.num_layers} layers, {compute}")


def _lengths(b: GraphBuilder, lengths: Lengths) -> tuple[Value, Value]:
    """(length - 1 of each sequence, int32 (B,); the longest length, int32 ())."""
    if lengths == "given":
        return b.input("seqlens_k", ir.DataType.INT32, ("batch",)), b.input("total_sequence_length", ir.DataType.INT32, ())
    mask = b.input("attention_mask", ir.DataType.INT64, ("batch", "total"))
    with b.scope("lengths"):
        real = b.op("ReduceSum", mask, b.axes(1), name="real", keepdims=0)
        last = b.op("Sub", real, b.constant(np.array([1], np.int64), "one"), name="last")
        width = b.op("Gather", b.op("Shape", mask, name="shape"), b.constant(np.array(1, np.int64), "axis"), name="width", axis=0)
        return b.op("Cast", last, name="last_int32", to=ir.DataType.INT32), b.op(
            "Cast", width, name="total_int32", to=ir.DataType.INT32
        )


def _angles(config: TransformerConfig, capacity: int, compute: str, part: str) -> NDArray[np.generic]:
    """cos or sin of position times angle, (capacity, head/2)."""
    pairs = np.arange(config.head_dim // 2, dtype=np.float64)
    theta = np.power(config.rotary_base, -2.0 * pairs / config.head_dim)
    angle = np.arange(capacity, dtype=np.float64)[:, None] * theta
    table: NDArray[np.generic] = (np.cos(angle) if part == "cos" else np.sin(angle)).astype(onnx_type(compute).numpy())
    return table
