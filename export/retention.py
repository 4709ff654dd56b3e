"""Multi-scale retention in torch: the three forms on heads q, k (B, H, T, Dk) and v (B, H, T, Dv), and the block around them.

    parallel   O = (Q Kᵀ ⊙ D) V                                        training; T² scores            (equation 5)
    recurrent  S_n = γ S_{n-1} + k_nᵀ v_n,   o_n = q_n S_n             one token, constant state      (equation 6)
    chunkwise  R_i = Kᵀ(V ⊙ ζ) + γ^C R_{i-1},                          a chunk in parallel form,
               O = (Q Kᵀ ⊙ D) V + (Q R_{i-1}) ⊙ ξ                      chunks in recurrent form       (equation 7)

Source: arXiv 2307.08621v4. Angles and decays are computed in float64 and rounded once, unlike the reference implementations,
whose float32 angles drift after some ten thousand tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retnet_export.graph.weights import retention_inputs
from retnet_export.runtime.bundle.config import ModelConfig


def parallel_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, score_norm: bool, clamp_rows: bool) -> Tensor:
    """Equation 5. With `score_norm`, rows of D are divided by √ΣD and, with `clamp_rows`, rows of scores by max(|Σ|, 1).

    Source of the normalisations: torchscale 0.3.0, component/multiscale_retention.py and architecture/retnet.py.
    """
    n = torch.arange(q.shape[2], device=q.device)
    distance = n[:, None] - n[None, :]  # (T, T)
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)  # (H, T, T)
    if score_norm:
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
    scores = (q @ k.mT) * decay.to(q.dtype)
    if score_norm and clamp_rows:
        scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1.0)
    return scores @ v


def recurrent_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 6 for a single token (T = 1): the output (B, H, 1, Dv) and the new state (B, H, Dk, Dv)."""
    state = gamma.to(state.dtype)[:, None, None] * state + (k.mT @ v).to(state.dtype)
    return q @ state.to(q.dtype), state


def chunkwise_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 7 for one chunk of C = T tokens: the output (B, H, C, Dv) and the new state (B, H, Dk, Dv)."""
    chunk = q.shape[2]
    j = torch.arange(chunk, device=q.device)
    zeta = (gamma[:, None] ** (chunk - 1 - j)).to(v.dtype)  # (H, C), decay from token j to the chunk's end
    xi = (gamma[:, None] ** (j + 1)).to(q.dtype)  # (H, C), decay from the chunk's start to token j
    inner = parallel_retention(q, k, v, gamma, score_norm=False, clamp_rows=False)
    cross = (q @ state.to(q.dtype)) * xi[..., None]
    state = k.mT @ (v * zeta[..., None]) + (gamma**chunk).to(state.dtype)[:, None, None] * state
    return inner + cross, state


class Norm(nn.Module):
    """RMSNorm, or LayerNorm, over the last axis, with or without a learnt scale; always in at least float32."""

    def __init__(self, kind: str, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * self.weight
        if self.bias is not None:
            wide = wide + self.bias
        return wide.to(x.dtype)


class Retention(nn.Module):
    """Multi-scale retention: projections, rotation, one of the three forms, head norm, gate, output (equation 8)."""

    gamma: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name, size in retention_inputs(config).items():
            self.add_module(name, nn.Linear(config.hidden_size, size, bias=config.retention_bias))
        per_head = config.head_norm_affine == "per_head"
        self.head_norm = Norm(
            config.head_norm,
            config.value_size if per_head else config.head_value_dim,
            config.head_norm_eps,
            affine=config.head_norm_affine != "none",
        )
        self.out = nn.Linear(config.value_size, config.hidden_size, bias=config.retention_bias)
        # A buffer would follow .half() down to γ = 1; a plain float64 tensor does not.
        self._gamma = torch.from_numpy(config.gamma)

    def heads(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), angles (B, T, Dk/2) -> rotated and scaled q, k (B, H, T, Dk) and v (B, H, T, Dv)."""
        config = self.config
        q, k, v = (self._split(name, x) for name in ("q", "k", "v"))
        q, k = (rotate(part, angles, config.rotary_layout) for part in (q, k))
        if config.scaled == "query":
            q = q * config.score_scale
        elif config.scaled == "key":
            k = k * config.score_scale
        repeats = config.num_heads // config.num_kv_heads
        return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    def _split(self, name: str, x: Tensor) -> Tensor:
        heads = self.config.num_heads if name == "q" else self.config.num_kv_heads
        return cast(Tensor, self.get_submodule(name)(x).unflatten(-1, (heads, -1)).transpose(1, 2))  # (B, heads, T, dim)

    def join(self, x: Tensor, o: Tensor) -> Tensor:
        """x (B, T, D) and the heads' outputs o (B, H, T, Dv) -> (B, T, D)."""
        o = o.transpose(1, 2)  # (B, T, H, Dv)
        if self.config.head_norm_affine == "per_head":
            o = self._norm_per_head(o)
        else:
            o = cast(Tensor, self.head_norm(o))
        o = o.flatten(2)
        if self.config.output_gate:
            o = F.silu(self.get_submodule("gate")(x)) * o
        return cast(Tensor, self.out(o))

    def _norm_per_head(self, o: Tensor) -> Tensor:
        plain = Norm(self.config.head_norm, 0, self.config.head_norm_eps, affine=False)(o)
        weight, bias = self.head_norm.weight, self.head_norm.bias
        assert weight is not None
        plain = plain * weight.view(o.shape[-2:])
        return cast(Tensor, plain if bias is None else plain + bias.view(o.shape[-2:]))

    def parallel(self, x: Tensor, angles: Tensor, clamp_rows: bool) -> Tensor:
        q, k, v = self.heads(x, angles)
        gamma = self._gamma.to(x.device)
        return self.join(x, parallel_retention(q, k, v, gamma, self.config.score_norm, clamp_rows))

    def chunkwise(self, x: Tensor, angles: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x, angles)
        gamma = self._gamma.to(x.device)
        form = recurrent_retention if x.shape[1] == 1 else chunkwise_retention
        o, state = form(q, k, v, gamma, state)
        if self.config.score_norm:
            read = position[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)  # (B, T) tokens read
            decayed = 1 - gamma[:, None] ** read[:, None, :]  # (B, H, T)
            o = o * ((1 - gamma)[:, None] / decayed).sqrt()[..., None].to(o.dtype)
        return self.join(x, o), state


def rotate(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """Turn each pair of channels of x (B, H, T, Dk) by angles (B or 1, T, Dk/2), which are float64."""
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    if layout == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
