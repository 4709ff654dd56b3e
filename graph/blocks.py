"""The parts of a RetNet that decode and prefill share, as ONNX nodes: norms, projections, rotation, feed-forward.

Norms and the swish are written as the operator sequences that runtimes recognise and fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.builder import Value
from retnet_export.graph.weights import retention_inputs
from retnet_export.graph.writer import Writer
from retnet_export.runtime.bundle.config import ModelConfig

PHASE_TURN = 1 << 32
"""One full turn of the rotary phase, which is an integer so that it is exact at any position."""


def norm(w: Writer, x: Value, name: str, kind: str, eps: float | Value, *, affine: bool = True) -> Value:
    """RMSNorm or LayerNorm over the last axis, float32: x / √(mean x² + eps) · weight (+ bias).

    Written as Pow, ReduceMean, Add, Sqrt, Div, Mul: the sequence that ONNX Runtime and TensorRT fuse into one kernel.
    """
    b, full = w.b, w.b.qualify(name)
    with b.scope(name):
        if kind == "layer":
            x = b.op("Sub", x, b.op("ReduceMean", x, b.axes(-1), name="mean", keepdims=1), name="centred")
        square = b.op("Pow", x, b.scalar(2.0, "two"), name="square")
        mean_square = b.op("ReduceMean", square, b.axes(-1), name="mean_square", keepdims=1)
        epsilon = b.scalar(eps, f"eps_{eps:.9g}") if isinstance(eps, float) else eps
        root = b.op("Sqrt", b.op("Add", mean_square, epsilon, name="plus_eps"), name="root")
        y = b.op("Div", x, root, name="normed")
        if affine:
            y = b.op("Mul", y, w.vector(f"{full}.weight"), name="scaled")
        if affine and kind == "layer":
            y = b.op("Add", y, w.vector(f"{full}.bias"), name="biased")
    return y


def swish(w: Writer, x: Value, name: str) -> Value:
    """x · sigmoid(x)."""
    with w.b.scope(name):
        return w.b.op("Mul", x, w.b.op("Sigmoid", x, name="sigmoid"), name="swish")


def activation(w: Writer, x: Value, kind: str, name: str) -> Value:
    """The feed-forward's nonlinearity; GELU is the exact one, x · (1 + erf(x/√2)) / 2."""
    if kind == "silu":
        return swish(w, x, name)
    b = w.b
    with b.scope(name):
        if kind == "relu":
            return b.op("Relu", x, name="relu")
        erf = b.op("Erf", b.op("Div", x, b.scalar(np.sqrt(2.0), "sqrt_two"), name="scaled"), name="erf")
        twice = b.op("Mul", x, b.op("Add", erf, b.scalar(1.0, "one"), name="plus_one"), name="twice")
        return b.op("Mul", twice, b.scalar(0.5, "half"), name="gelu")


def feed_forward(w: Writer, x: Value) -> Value:
    """down(act(gate(x)) · up(x)), or down(act(up(x))); gate and up are one product."""
    b, config = w.b, w.config
    with b.scope("ffn"):
        if config.ffn == "glu":
            joined = joined_linear(w, x, "gate_up", ("gate", "up"))
            gate, up = b.op_n("Split", joined, names=["gate", "up"], axis=-1, num_outputs=2)
            inner = b.op("Mul", activation(w, gate, config.ffn_activation, "act"), up, name="gated")
        else:
            inner = activation(w, w.linear(x, "up"), config.ffn_activation, "act")
        if config.ffn_inner_norm != "none":
            inner = norm(w, inner, "inner_norm", config.ffn_inner_norm, config.norm_eps)
        return w.linear(inner, "down")


def joined_linear(w: Writer, x: Value, name: str, parts: Sequence[str], order: NDArray[np.int64] | None = None) -> Value:
    """Linear layers of one input as a single product, their outputs side by side (permuted by `order`)."""
    full = [w.b.qualify(part) for part in parts]
    weight = w.matrix(f"{w.b.qualify(name)}.weight", [f"{part}.weight" for part in full], order=order)
    if f"{full[0]}.bias" not in w.shapes:
        return w.product(x, weight, name)

    def make_bias() -> NDArray[np.generic]:
        joined = np.concatenate([w.float32(f"{part}.bias") for part in full])
        return joined if order is None else joined[order]

    return w.product(x, weight, name, w.b.initializer(w.file.tensor(f"{w.b.qualify(name)}.bias", make_bias)))


def phase_per_token(config: ModelConfig) -> NDArray[np.int64]:
    """How far each rotary pair turns per token, (Dk/2,), in parts of `PHASE_TURN`."""
    return np.rint(config.theta / (2 * np.pi) * PHASE_TURN).astype(np.int64)


def rotation(w: Writer, position: Value) -> tuple[Value, Value]:
    """cos and sin of every pair's angle at `position` int64 (…): float32 (…, Dk/2).

    The angle n·θ is kept as an integer phase, n·round(θ/2π · 2³²) mod 2³². A float32 angle is off by 9e-4 at token 100,000;
    the phase is as good at token 2³¹ as at token 1. Reducing n first keeps the product inside int64 at any position.
    """
    b = w.b
    steps = phase_per_token(w.config)
    with b.scope("rotation"):
        turn = b.constant(np.array(PHASE_TURN, np.int64), "phase_turn")
        reduced = b.op("Unsqueeze", b.op("Mod", position, turn, name="position"), b.axes(-1), name="position_column")
        advance = b.op("Mul", reduced, b.constant(steps, "phase_per_token"), name="advance")
        phase = b.op("Cast", b.op("Mod", advance, turn, name="phase"), name="phase_float", to=ir.DataType.FLOAT)
        angle = b.op("Mul", phase, b.scalar(2 * np.pi / PHASE_TURN, "radians_per_phase"), name="angle")
        return b.op("Cos", angle, name="cos"), b.op("Sin", angle, name="sin")


def rotated_projection_order(config: ModelConfig) -> NDArray[np.int64]:
    """The order in which the joined outputs of q, k, v and gate are stored.

    First channels of all rotary pairs of q, then of k; second channels of q, then of k; then v and gate as they are. One
    Split then gives the two halves to rotate for queries and keys at once, whatever the family's pair layout: permuting
    Dk in the same way in q and k leaves q·k and the output as they are.
    """
    half = config.head_key_dim // 2

    def channels(heads: int, offset: int, second: bool) -> NDArray[np.int64]:
        pair = np.arange(half)
        channel = 2 * pair + second if config.rotary_layout == "interleaved" else pair + half * second
        return (offset + np.arange(heads)[:, None] * config.head_key_dim + channel).reshape(-1)

    keys = config.num_kv_heads * config.head_key_dim
    rest = config.num_kv_heads * config.head_value_dim + (config.value_size if config.output_gate else 0)
    parts = [
        channels(heads, offset, second)
        for second in (False, True)
        for heads, offset in ((config.num_heads, 0), (config.num_kv_heads, config.key_size))
    ]
    return np.concatenate([*parts, config.key_size + keys + np.arange(rest)])


@dataclass(frozen=True)
class Projections:
    """Rotated q, k and v of one layer, and the gate; shapes are (lead…, heads, size)."""

    q: Value
    k: Value
    v: Value
    gate: Value | None


def projections(w: Writer, x: Value, cos: Value, sin: Value) -> Projections:
    """q, k, v and gate as one product; q and k rotated together; keys and values repeated if they serve several queries.

    Args:
        x: normed input, (lead…, D).
        cos, sin: (lead…, 1, Dk/2), so that they broadcast over heads.
    """
    b, config = w.b, w.config
    parts = [*retention_inputs(config)]
    joined = joined_linear(w, x, "projections", parts, rotated_projection_order(config))
    heads, groups, half = config.num_heads, config.num_kv_heads, config.head_key_dim // 2
    sizes = [(heads + groups) * half, (heads + groups) * half, groups * config.head_value_dim]
    names = ["qk_first", "qk_second", "v_flat"]
    if config.output_gate:
        sizes, names = [*sizes, config.value_size], [*names, "gate"]
    first, second, v, *gate = b.op_n("Split", joined, b.constant(sizes, "projection_sizes"), names=names, axis=-1)
    first, second = (
        w.reshape(part, f"{name}_heads", heads + groups, half) for part, name in ((first, "qk_first"), (second, "qk_second"))
    )
    real = b.op("Sub", b.op("Mul", first, cos, name="first_cos"), b.op("Mul", second, sin, name="second_sin"), name="rotated_first")
    imaginary = b.op(
        "Add", b.op("Mul", second, cos, name="second_cos"), b.op("Mul", first, sin, name="first_sin"), name="rotated_second"
    )
    rotated = b.op("Concat", real, imaginary, name="qk", axis=-1)
    q, k = b.op_n("Split", rotated, b.constant([heads, groups], "qk_heads"), names=["q", "k"], axis=-2)
    v = w.reshape(v, "v", groups, config.head_value_dim)
    if groups != heads:
        repeat = b.constant(np.arange(heads) // (heads // groups), "kv_head_of_head")
        axis = len(w.lead)
        k, v = (b.op("Gather", part, repeat, name=f"{name}_repeated", axis=axis) for part, name in ((k, "k"), (v, "v")))
    return Projections(q, k, v, gate[0] if gate else None)


def head_norm(w: Writer, o: Value, read: Value | None) -> Value:
    """Norm of each head's output over Dv: (lead…, H, Dv).

    The scale of q·k, and torchscale's 1/√Σγ, are applied here, through eps: norm(c·o) with eps is norm(o) with eps/c².
    That spares two passes over the heads and leaves weights and state as they are.

    Args:
        o: the heads' outputs before scaling.
        read: tokens read so far, including this one, float32 (lead…, 1, 1); needed only with `score_norm`.
    """
    b, config = w.b, w.config
    eps: float | Value = config.head_norm_eps / config.score_scale**2
    if config.score_norm:
        assert read is not None
        assert isinstance(eps, float)
        # Σ_{m<n} γ^m = (1 - γⁿ)/(1 - γ), per head.
        log_gamma = b.constant(np.log(config.gamma).astype(np.float32)[:, None], "log_gamma")
        kept = b.op("Exp", b.op("Mul", read, log_gamma, name="log_kept"), name="kept")
        lost = b.op("Sub", b.scalar(1.0, "one"), kept, name="lost")
        eps = b.op("Mul", lost, b.constant((eps / (1 - config.gamma)).astype(np.float32)[:, None], "eps_per_head"), name="eps")
    if config.head_norm_affine != "per_head":
        return norm(w, o, "head_norm", config.head_norm, eps, affine=config.head_norm_affine == "shared")
    normed = norm(w, o, "head_norm", config.head_norm, eps, affine=False)
    full, shape = b.qualify("head_norm"), (config.num_heads, config.head_value_dim)
    y = b.op("Mul", normed, w.vector(f"{full}.weight", shape), name="head_norm.scaled")
    return b.op("Add", y, w.vector(f"{full}.bias", shape), name="head_norm.biased") if config.head_norm == "layer" else y


def join_heads(w: Writer, o: Value, gate: Value | None) -> Value:
    """Heads side by side, gated, through the output projection: (lead…, D)."""
    joined = w.reshape(o, "joined", w.config.value_size)
    if gate is not None:
        joined = w.b.op("Mul", swish(w, gate, "gate_act"), joined, name="gated")
    return w.linear(joined, "out")
