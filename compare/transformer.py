"""The baseline's architecture: a Llama-style decoder with a RetNet's width, depth, vocabulary and parameter count.

Rule: fair by construction. Everything that the two architectures have in common is taken from the RetNet (width, depth,
vocabulary, tied head); the feed-forward width is the one free number, and it is chosen so that the parameters agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.weights import parameters
from retnet_export.runtime.errors import ArgumentError, UserError

PARAMETER_MATCH = 0.01
"""The parameter counts differ by at most this share if a feed-forward width allows it; else the report says by how much."""


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder with RMSNorm, rotary embedding, grouped-query attention and a SwiGLU feed-forward, all without biases.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: heads of keys and values; N is multi-head attention.
        head_dim: size of a head; a multiple of 16, which ONNX Runtime's rotary embedding asks for.
        ffn_size: inner width of the feed-forward block.
        norm_eps: epsilon of all norms.
        rotary_base: the base of the rotary angles.
        tied_embeddings: whether the output head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float = 1e-6
    rotary_base: float = 10000.0
    tied_embeddings: bool = False

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(math.prod(shape) for shape in weight_shapes(self).values())

    def cache_bytes(self, context: int, element_bytes: int) -> int:
        """Bytes of keys and values of one sequence of `context` tokens."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * context * element_bytes

    @property
    def shared_parts(self) -> ModelConfig:
        """The settings of the parts that the graph shares with the RetNet's: embedding, norms, feed-forward, head."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_key_dim=self.head_dim,
            head_value_dim=self.head_dim,
            ffn_size=self.ffn_size,
            norm_eps=self.norm_eps,
            rotary_base=self.rotary_base,
            tied_embeddings=self.tied_embeddings,
        )


def transformer_like(config: ModelConfig, kv_heads: int | None = None, group: int = 1) -> TransformerConfig:
    """The baseline for a RetNet.

    Args:
        kv_heads: heads of keys and values; as many as query heads when None.
        group: inputs of a matrix that share a scale, which must divide the feed-forward width.

    Raises:
        UserError: `kv_heads` does not divide the query heads, or the attention alone has more parameters than the RetNet.
    """
    # Heads of 64 up to Llama 3.2's 1B (width 2048), of 128 above, as is usual. Their product need not be the width.
    head_dim = 64 if config.hidden_size <= 2048 else 128
    head_dim = min(head_dim, 16 * max(1, config.hidden_size // 16))
    heads = max(1, round(config.hidden_size / head_dim))
    groups = heads if kv_heads is None else kv_heads
    if groups < 1 or heads % groups:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ArgumentError("kv_heads", f"is {groups}, expected a divisor of the baseline's {heads} query heads: {divisors}")

    def with_ffn(size: int) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head_dim,
            ffn_size=size,
            norm_eps=config.norm_eps,
            tied_embeddings=config.tied_embeddings,
        )

    wanted = parameters(config)
    exact = (wanted - with_ffn(0).parameters) / (3 * config.hidden_size * config.num_layers)
    # Round widths first: kernels and quantization blocks like them.
    for multiple in (128, 64, 32, 16, 8, 1):
        size = multiple * round(exact / multiple)
        if size > 0 and size % group == 0 and abs(with_ffn(size).parameters - wanted) <= PARAMETER_MATCH * wanted:
            return with_ffn(size)
    if exact > 0:
        return with_ffn(group * max(1, round(exact / group)))
    raise UserError(
        f"no Transformer of width {config.hidden_size} and {config.num_layers} layers has the RetNet's {wanted:,} parameters: "
        "its attention alone has more. A fair comparison is not possible"
    )


def weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every weight's name with its shape; matrices are (outputs, inputs)."""
    width, inner = config.hidden_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, width)}
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.attention_norm.weight": (width,),
            f"{layer}.attention.q.weight": (inner, width),
            f"{layer}.attention.k.weight": (kv_width, width),
            f"{layer}.attention.v.weight": (kv_width, width),
            f"{layer}.attention.out.weight": (width, inner),
            f"{layer}.ffn_norm.weight": (width,),
            f"{layer}.ffn.gate.weight": (config.ffn_size, width),
            f"{layer}.ffn.up.weight": (config.ffn_size, width),
            f"{layer}.ffn.down.weight": (width, config.ffn_size),
        }
    shapes["norm.weight"] = (width,)
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab_size, width)
    return shapes


class RandomWeights:
    """Random weights by name, made when read, so that a large baseline needs one tensor of memory. Speed does not depend on them.

    Args:
        seed: same seed, same weights.
    """

    def __init__(self, config: TransformerConfig, seed: int = 0) -> None:
        self._shapes, self._seed = weight_shapes(config), seed
        self._index = {name: index for index, name in enumerate(self._shapes)}

    def __call__(self, name: str) -> NDArray[np.float32]:
        shape = self._shapes[name]
        generator = np.random.default_rng([self._seed, self._index[name]])
        value = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            value = value * np.float32(0.1) + np.float32(1.0)
        elif name != "embedding.weight":
            value *= np.float32(shape[1] ** -0.5)
        return value
