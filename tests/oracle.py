"""The judge: a RetNet in float64 NumPy, one token at a time, written from the paper for reading and not for speed.

Every other form (torch parallel, chunkwise and recurrent, the ONNX graphs, each backend) is compared with this one. It
shares nothing with them but the configuration and the canonical weights. Equations are those of arXiv 2307.08621v4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.config import ModelConfig

Array = NDArray[np.float64]


def logits(config: ModelConfig, weights: Mapping[str, NDArray[np.generic]], tokens: NDArray[np.int64]) -> Array:
    """Logits (T, V) after each of `tokens` (T,), by the recurrent form (equation 6)."""
    state = initial_state(config)
    rows = []
    for position, token in enumerate(tokens):
        row, state = step(config, weights, int(token), position, state)
        rows.append(row)
    return np.stack(rows)


def initial_state(config: ModelConfig) -> list[Array]:
    """One (H, Dk, Dv) of zeros a layer."""
    shape = (config.num_heads, config.head_key_dim, config.head_value_dim)
    return [np.zeros(shape) for _ in range(config.num_layers)]


def step(
    config: ModelConfig, weights: Mapping[str, NDArray[np.generic]], token: int, position: int, state: list[Array]
) -> tuple[Array, list[Array]]:
    """Logits (V,) after `token` at `position`, and the state after it."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()} if position == 0 else weights
    x = w["embedding.weight"][token].astype(np.float64) * config.embedding_scale
    if config.embedding_norm:
        x = norm(config.norm, x, w, "embedding_norm", config.norm_eps)
    after = []
    for index in range(config.num_layers):
        layer = f"layers.{index}"

        def retain(y: Array, layer: str = layer, before: Array = state[index]) -> Array:
            o, left = retention(config, w, f"{layer}.retention", y, position, before)
            after.append(left)
            return o

        x = residual(config, x, w, f"{layer}.retention_norm", retain)
        x = residual(config, x, w, f"{layer}.ffn_norm", lambda y, layer=layer: feed_forward(config, w, f"{layer}.ffn", y))
    if config.final_norm:
        x = norm(config.norm, x, w, "norm", config.norm_eps)
    return np.asarray(w["embedding.weight" if config.tied_embeddings else "head.weight"], np.float64) @ x, after


def retention(config: ModelConfig, w, name: str, x: Array, position: int, state: Array) -> tuple[Array, Array]:
    """Multi-scale retention of one token (equations 6 and 8): x (D,) and S (H, Dk, Dv) -> the output (D,) and the new S."""
    heads, groups = config.num_heads, config.num_kv_heads
    q = linear(x, w, f"{name}.q").reshape(heads, -1)  # (H, Dk)
    k = linear(x, w, f"{name}.k").reshape(groups, -1).repeat(heads // groups, 0)  # (H, Dk)
    v = linear(x, w, f"{name}.v").reshape(groups, -1).repeat(heads // groups, 0)  # (H, Dv)
    q, k = (rotate(config, part, position) for part in (q, k))
    o = np.empty((heads, config.head_value_dim))
    new = np.empty_like(state)
    for h, gamma in enumerate(config.gamma):
        new[h] = gamma * state[h] + np.outer(k[h], v[h])
        o[h] = config.score_scale * q[h] @ new[h]
        if config.score_norm:
            o[h] /= math.sqrt(sum(gamma**m for m in range(position + 1)))
    if config.head_norm_affine == "per_head":
        split = {key: np.asarray(w[key], np.float64).reshape(heads, -1) for key in w if key.startswith(f"{name}.head_norm.")}
        o = np.stack(
            [
                norm(config.head_norm, o[h], {k: s[h] for k, s in split.items()}, f"{name}.head_norm", config.head_norm_eps)
                for h in range(heads)
            ]
        )
    else:
        o = norm(config.head_norm, o, w, f"{name}.head_norm", config.head_norm_eps)
    joined = o.reshape(-1)
    if config.output_gate:
        joined = act("silu", linear(x, w, f"{name}.gate")) * joined
    return linear(joined, w, f"{name}.out"), new


def rotate(config: ModelConfig, x: Array, position: int) -> Array:
    """Turn each pair of channels of x (H, Dk) by position·θ, as one complex multiplication a pair."""
    turn = np.exp(1j * position * config.theta)
    half = config.head_key_dim // 2
    first, second = (slice(half), slice(half, None)) if config.rotary_layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    z = (x[:, first] + 1j * x[:, second]) * turn
    out = np.empty_like(x)
    out[:, first], out[:, second] = z.real, z.imag
    return out


def feed_forward(config: ModelConfig, w, name: str, x: Array) -> Array:
    inner = linear(x, w, f"{name}.up")
    if config.ffn == "glu":
        inner = act(config.ffn_activation, linear(x, w, f"{name}.gate")) * inner
    else:
        inner = act(config.ffn_activation, inner)
    if config.ffn_inner_norm != "none":
        inner = norm(config.ffn_inner_norm, inner, w, f"{name}.inner_norm", config.norm_eps)
    return linear(inner, w, f"{name}.down")


def residual(config: ModelConfig, x: Array, w, norm_name: str, block) -> Array:
    if config.post_norm:
        return norm(config.norm, config.residual_scale * x + block(x), w, norm_name, config.norm_eps)
    return config.residual_scale * x + block(norm(config.norm, x, w, norm_name, config.norm_eps))


def norm(kind: str, x: Array, w, name: str, eps: float) -> Array:
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)


def linear(x: Array, w, name: str) -> Array:
    return np.asarray(w[f"{name}.weight"], np.float64) @ x + w.get(f"{name}.bias", 0.0)


def act(kind: str, x: Array) -> Array:
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "gelu":
        return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    return x / (1.0 + np.exp(-x))
