"""The architecture of a RetNet as plain data: every difference between the public families is a field here.

Later stages do not know the family of a checkpoint; they read this configuration. Symbols are the paper's
(arXiv 2307.08621, section 2) and are listed in docs/reference/glossary.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one RetNet.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, the width of the residual stream.
        num_layers: L.
        num_heads: H, heads of queries, values and states.
        head_key_dim: Dk, key and query size of one head; even, because rotation works on pairs.
        head_value_dim: Dv, value size of one head.
        ffn_size: inner width of the feed-forward block.
        num_kv_heads: heads of keys and values; each serves `num_heads / num_kv_heads` query heads.
        decay: γ_h; "power_of_two" is 1 - 2^(-5-h) (equation 8), "log_spaced" is 1 - exp(linspace(ln 1/32, ln 1/512)).
        rotary_layout: which channels form a pair: "half" (i, i + Dk/2) or "interleaved" (2i, 2i + 1).
        rotary_spacing: θ_i; "geometric" is base^(-2i/Dk), "inclusive" is base^(-linspace(0, 1, Dk/2)).
        rotary_base: the base of θ.
        scaled: which of query and key is multiplied by Dk^-½, if either.
        score_norm: torchscale's normalisation: rows of the decay matrix are divided by √Σγ, rows of scores by max(|Σ|, 1).
            The second exists only in the parallel form.
        head_norm: normalisation of each head's output: "rms" or "layer" (which subtracts the mean).
        head_norm_affine: its learnt scale: none, one of size Dv "shared" by the heads, or "per_head" (with a bias if "layer").
        head_norm_eps: its epsilon.
        output_gate: whether the heads' output is multiplied by swish(x W_G) (equation 8).
        retention_bias: whether the five projections of retention have biases.
        ffn: "glu" is down(act(gate(x)) * up(x)); "mlp" is down(act(up(x))).
        ffn_activation: act.
        ffn_bias: whether its projections have biases.
        ffn_inner_norm: the norm before the down projection (sub-LN), if any: "rms", or "layer" with a bias.
        norm: the norm of the residual stream: "rms", or "layer" with a bias.
        norm_eps: its epsilon.
        post_norm: norm after the residual sum instead of before the block (DeepNorm).
        residual_scale: the residual is multiplied by this before the sum (DeepNorm's α, 1 otherwise).
        embedding_scale: the embedding is multiplied by this.
        embedding_norm: whether a norm follows the embedding.
        final_norm: whether a norm precedes the output head.
        tied_embeddings: whether the output head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_key_dim: int
    head_value_dim: int
    ffn_size: int
    num_kv_heads: int
    decay: Literal["power_of_two", "log_spaced"] = "power_of_two"
    rotary_layout: Literal["half", "interleaved"] = "half"
    rotary_spacing: Literal["geometric", "inclusive"] = "geometric"
    rotary_base: float = 10000.0
    scaled: Literal["query", "key", "none"] = "query"
    score_norm: bool = False
    head_norm: Literal["rms", "layer"] = "rms"
    head_norm_affine: Literal["none", "shared", "per_head"] = "shared"
    head_norm_eps: float = 1e-6
    output_gate: bool = True
    retention_bias: bool = False
    ffn: Literal["glu", "mlp"] = "glu"
    ffn_activation: Literal["silu", "gelu", "relu"] = "silu"
    ffn_bias: bool = False
    ffn_inner_norm: Literal["none", "rms", "layer"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    post_norm: bool = False
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_key_dim", "head_value_dim", "ffn_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model configuration: {name} is {getattr(self, name)}, expected at least 1")
        if self.head_key_dim % 2:
            raise UserError(f"model configuration: head_key_dim is {self.head_key_dim}, expected an even number (rotary pairs)")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model configuration: num_kv_heads is {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
            )

    @property
    def gamma(self) -> NDArray[np.float64]:
        """γ, the decay of each head, (H,). Never to be rounded below float32: 1 - 2^-12 is 1 in float16."""
        if self.decay == "power_of_two":
            return 1.0 - 2.0 ** (-5.0 - np.arange(self.num_heads, dtype=np.float64))
        return 1.0 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), self.num_heads))

    @property
    def theta(self) -> NDArray[np.float64]:
        """θ, the angle each rotary pair turns per token, (Dk/2,) in radians."""
        pairs = self.head_key_dim // 2
        exponent = np.linspace(0.0, 1.0, pairs)
        if self.rotary_spacing == "geometric":
            exponent = 2.0 * np.arange(pairs, dtype=np.float64) / self.head_key_dim
        return np.asarray(np.power(self.rotary_base, -exponent), np.float64)

    @property
    def score_scale(self) -> float:
        """The factor on q·k: Dk^-½, or 1 when neither is scaled."""
        return 1.0 if self.scaled == "none" else float(self.head_key_dim**-0.5)

    @property
    def key_size(self) -> int:
        """H·Dk, the width of the query projection."""
        return self.num_heads * self.head_key_dim

    @property
    def value_size(self) -> int:
        """H·Dv, the width of the gate and of the heads' joined output."""
        return self.num_heads * self.head_value_dim

    @property
    def state_elements(self) -> int:
        """Numbers in the state of one sequence: L·H·Dk·Dv."""
        return self.num_layers * self.num_heads * self.head_key_dim * self.head_value_dim
