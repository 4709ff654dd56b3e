"""`prefill.onnx`: up to a chunk of tokens per sequence in, logits after the tokens asked for out; state in and out as in decode.

The chunkwise form (equation 7) with the state between chunks explicit. For a sequence of n real tokens in a chunk of C:

    S' = γⁿ S + (K ⊙ ζ)ᵀ V        ζ_m = γ^(n-1-m) for m < n, 0 for padding
    O  = (Q Kᵀ ⊙ D) V + (Q ⊙ ξ) S   D_jm = γ^(j-m) for j ≥ m, 0 otherwise;  ξ_j = γ^(j+1)

What stands after the real tokens D hides from them, and ζ from the state; token ids outside the vocabulary are replaced before
they are looked up. So padding cannot show, and a sequence of no tokens keeps its state bit by bit.

Logits are computed for the tokens that `rows` names, (B, R), and no others: the rest is dropped before the final norm and the
head. A row may lie after the real tokens: such a token is a draft. It sees every token of the chunk before it, drafts included, as
a real token there would, and the state does not see it. So a host may look at what follows a guess and have nothing to undo.

Sketch of a layer, B sequences of C tokens:

    x (B, C, D) ─ norm ─ projections ─┬─ q (B, H, C, Dk) ─┬── Q Kᵀ ── ·D ── (…)V ─┐
                                      ├─ k (B, H, Dk, C) ─┤                       Add ─ head norm ─ · swish(gate) ─ out ─ + x
                                      ├─ v (B, H, C, Dv) ─┼─ (K·ζ)ᵀV ─┐           │
                      state.i (B, H, Dk, Dv) ─ (Q·ξ)S ────┴───────────┼───────────┘
                      state.i ─ ·γⁿ ─────────────────────────────── Add ─ state.i_out
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_export.graph.blocks import head_norm, join_heads, projections, rotation
from retnet_export.graph.builder import GraphBuilder, Value
from retnet_export.graph.retnet import OPSET, embed, layers, logits
from retnet_export.graph.weights import ReadWeight
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.graph.writer import Writer
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import state_name


def build_prefill(config: ModelConfig, read: ReadWeight, file: WeightsFile, compute: str, batch: int | None = None) -> ir.Model:
    """Write the graph that reads several tokens at once; weights have the names and layouts of decode's, so both share a copy."""
    b = GraphBuilder("prefill", OPSET)
    w = Writer(b, config, read, file, compute, lead=(0, 0))
    size: int | str = "batch" if batch is None else batch
    state_shape = (size, config.num_heads, config.head_key_dim, config.head_value_dim)
    tokens = b.input("tokens", ir.DataType.INT64, (size, "chunk"))
    position = b.input("position", ir.DataType.INT64, (size,))
    length = b.input("length", ir.DataType.INT64, (size,))
    rows = b.input("rows", ir.DataType.INT64, (size, "rows"))
    states = [b.input(state_name(index), ir.DataType.FLOAT, state_shape) for index in range(config.num_layers)]

    after = b.op("Add", position, length, name="position_after")
    index = _token_index(b, tokens)  # (C,)
    length_column = b.op("Unsqueeze", length, b.axes(1), name="length_column")  # (B, 1)
    real = b.op("Less", index, length_column, name="real")  # (B, C)
    positions = b.op("Add", b.op("Unsqueeze", position, b.axes(1), name="position_column"), index, name="positions")  # (B, C)
    cos, sin = rotation(w, b.op("Unsqueeze", positions, b.axes(-1), name="positions_column"))  # (B, C, 1, Dk/2)
    read_count = None
    if config.score_norm:
        count = b.op("Add", positions, _integer(b, 1), name="tokens_read_after")
        count = b.op("Cast", count, name="tokens_read", to=ir.DataType.FLOAT)
        read_count = b.op("Unsqueeze", count, b.axes(-2, -1), name="tokens_read_column")  # (B, C, 1, 1)
    decay = _decay(b, config, index, length_column, real)
    state_after: list[Value] = []

    def retain(layer: int, x: Value) -> Value:
        p = projections(w, x, cos, sin)
        q = b.op("Transpose", p.q, name="q_of_head", perm=[0, 2, 1, 3])  # (B, H, C, Dk)
        k = b.op("Transpose", p.k, name="k_of_head", perm=[0, 2, 3, 1])  # (B, H, Dk, C)
        v = b.op("Transpose", p.v, name="v_of_head", perm=[0, 2, 1, 3])  # (B, H, C, Dv)
        state = states[layer]
        scores = b.op("Mul", b.op("MatMul", q, k, name="scores"), decay.within, name="scores_decayed")  # (B, H, C, C)
        inner = b.op("MatMul", scores, v, name="read_chunk")  # (B, H, C, Dv)
        cross = b.op("MatMul", b.op("Mul", q, decay.since_state, name="q_decayed"), state, name="read_state")
        o = b.op("Transpose", b.op("Add", inner, cross, name="read"), name="o", perm=[0, 2, 1, 3])  # (B, C, H, Dv)
        update = b.op("MatMul", b.op("Mul", k, decay.to_end, name="k_decayed"), v, name="key_value")  # (B, H, Dk, Dv)
        new = b.op("Add", b.op("Mul", state, decay.whole, name="decayed"), update, name="state_after")
        state_after.append(new)
        return join_heads(w, head_norm(w, o, read_count), p.gate)

    token = b.op("Min", tokens, _integer(b, config.vocab_size - 1), name="tokens_below_end")
    token = b.op("Max", token, _integer(b, 0), name="tokens_in_vocabulary")
    x = layers(w, embed(w, token), retain)
    x = b.op("GatherND", x, b.op("Unsqueeze", rows, b.axes(-1), name="rows_column"), name="rows_wanted", batch_dims=1)  # (B, R, D)
    b.output(logits(w, x), "logits", ir.DataType.FLOAT, (size, "rows", config.vocab_size))
    b.output(after, "position_out", ir.DataType.INT64, (size,))
    for layer, value in enumerate(state_after):
        b.output(value, f"{state_name(layer)}_out", ir.DataType.FLOAT, state_shape)
    return b.model(f"RetNet prefill, {config.num_layers} layers, {compute}")


@dataclass(frozen=True)
class _Decay:
    """Powers of γ, float32, once for all layers.

    Attributes:
        within: D, from token m to token j of the chunk, (H, C, C).
        since_state: ξ, from the state to token j, (H, C, 1).
        to_end: ζ, from token m to the last real token, 0 for padding, (B, H, 1, C).
        whole: γⁿ, from the state to the last real token, (B, H, 1, 1).
    """

    within: Value
    since_state: Value
    to_end: Value
    whole: Value


def _token_index(b: GraphBuilder, tokens: Value) -> Value:
    """0 … C-1, int64 (C,)."""
    with b.scope("token_index"):
        count = b.op("Squeeze", b.op("Shape", tokens, name="count_list", start=1, end=2), b.axes(0), name="count")
        return b.op("Range", _integer(b, 0), count, _integer(b, 1), name="range")


def _integer(b: GraphBuilder, value: int) -> Value:
    return b.constant(np.array(value, np.int64), f"int_{value}")


def _decay(b: GraphBuilder, config: ModelConfig, index: Value, length: Value, real: Value) -> _Decay:
    """Powers as exp(n·ln γ): n is exact, and ln γ in float32 keeps what γ itself would lose near 1.

    Args:
        index: int64 (C,).
        length: int64 (B, 1).
        real: bool (B, C).
    """
    log_gamma = np.log(config.gamma).astype(np.float32)

    def power(exponent: Value, name: str, trailing: int) -> Value:
        """γ^exponent; the heads' axis stands before the last `trailing` axes of `exponent`."""
        shaped = b.constant(log_gamma.reshape(-1, *[1] * trailing), f"log_gamma_{trailing}")
        exponent = b.op("Cast", exponent, name=f"{name}_exponent", to=ir.DataType.FLOAT)
        return b.op("Exp", b.op("Mul", exponent, shaped, name=f"{name}_log"), name=name)

    with b.scope("decay"):
        none, one = b.scalar(0.0, "no_weight"), _integer(b, 1)
        column = b.op("Unsqueeze", index, b.axes(1), name="index_column")  # (C, 1)
        distance = b.op("Sub", column, index, name="distance")  # (C, C)
        past = b.op("GreaterOrEqual", column, index, name="past")
        within = b.op("Where", past, power(distance, "within_any", 2), none, name="within")
        since_state = power(b.op("Add", column, one, name="tokens_since_state"), "since_state", 2)
        to_last = b.op("Sub", b.op("Sub", length, one, name="last"), index, name="tokens_to_last")  # (B, C)
        to_last = b.op("Unsqueeze", to_last, b.axes(1, 2), name="tokens_to_last_row")  # (B, 1, 1, C)
        real_row = b.op("Unsqueeze", real, b.axes(1, 2), name="real_row")
        to_end = b.op("Where", real_row, power(to_last, "to_end_any", 2), none, name="to_end")
        whole = power(b.op("Unsqueeze", length, b.axes(1, 2), name="length_of_head"), "whole", 2)
    return _Decay(within, since_state, to_end, whole)
