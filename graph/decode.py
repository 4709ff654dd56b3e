"""`decode.onnx`: one token per sequence in, logits out, state in and out. A true single step: no token axis, no loop.

    S_n = γ S_{n-1} + k_nᵀ v_n        o_n = q_n S_n        (equation 6)

Sketch of a layer, B sequences:

    x (B, D) ─ norm ─ projections ─┬─ q (B, H, 1, Dk) ──────────────┐
                                   ├─ k (B, H, Dk, 1) ─┐            MatMul ─ head norm ─ · swish(gate) ─ out ─ + x
                                   └─ v (B, H, 1, Dv) ─┴ k·v ─┐     │
                         state.i (B, H, Dk, Dv) ─ ·γ ─────── Add ───┴─ state.i_out
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_export.graph.blocks import head_norm, join_heads, projections, rotation
from retnet_export.graph.builder import GraphBuilder, Value
from retnet_export.graph.retnet import OPSET, embed, layers, logits
from retnet_export.graph.states import allow_in_place
from retnet_export.graph.weights import ReadWeight
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.graph.writer import Writer
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import state_name


def build_decode(config: ModelConfig, read: ReadWeight, file: WeightsFile, compute: str, batch: int | None = None) -> ir.Model:
    """Write the single-step graph, for a fixed batch or for any; `compute` is "float32", "float16" or "bfloat16"."""
    b = GraphBuilder("decode", OPSET)
    w = Writer(b, config, read, file, compute, lead=(0,))
    size: int | str = "batch" if batch is None else batch
    state_shape = (size, config.num_heads, config.head_key_dim, config.head_value_dim)
    tokens = b.input("tokens", ir.DataType.INT64, (size, 1))
    position = b.input("position", ir.DataType.INT64, (size,))
    states = [b.input(state_name(index), ir.DataType.FLOAT, state_shape) for index in range(config.num_layers)]

    after = b.op("Add", position, b.constant(np.array([1], np.int64), "one_token"), name="position_after")
    cos, sin = rotation(w, b.op("Unsqueeze", position, b.axes(-1), name="position_row"))  # (B, 1, Dk/2)
    read_count = None
    if config.score_norm:
        count = b.op("Cast", after, name="tokens_read", to=ir.DataType.FLOAT)
        read_count = b.op("Reshape", count, b.shape(0, 1, 1), name="tokens_read_column")
    # One copy of γ for each row of the state: ONNX Runtime deals out the rows to its threads, and H heads are too few to share.
    gamma = b.constant(
        np.repeat(config.gamma.astype(np.float32)[:, None, None], config.head_key_dim, axis=1), "gamma"
    )  # (H, Dk, 1)
    state_after: list[Value] = []

    def retain(index: int, x: Value) -> Value:
        p = projections(w, x, cos, sin)
        q = b.op("Unsqueeze", p.q, b.axes(2), name="q_row")  # (B, H, 1, Dk)
        k = b.op("Unsqueeze", p.k, b.axes(3), name="k_column")  # (B, H, Dk, 1)
        v = b.op("Unsqueeze", p.v, b.axes(2), name="v_row")  # (B, H, 1, Dv)
        decayed = b.op("Mul", states[index], gamma, name="decayed")
        new = b.op("Add", decayed, b.op("Mul", k, v, name="key_value"), name="state_after")
        o = b.op("Squeeze", b.op("MatMul", q, new, name="read"), b.axes(2), name="o")  # (B, H, Dv)
        state_after.append(new)
        return join_heads(w, head_norm(w, o, read_count), p.gate)

    token = b.op("Squeeze", tokens, b.axes(1), name="token")
    out = logits(w, layers(w, embed(w, token), retain))
    b.output(out, "logits", ir.DataType.FLOAT, (size, config.vocab_size))
    b.output(after, "position_out", ir.DataType.INT64, (size,))
    for index, value in enumerate(state_after):
        b.output(value, f"{state_name(index)}_out", ir.DataType.FLOAT, state_shape)
    model = b.model(f"RetNet decode step, {config.num_layers} layers, {compute}")
    allow_in_place(model)  # one operator reads a layer's state, and a later one writes it
    return model
