"""The canonical names and shapes of a RetNet's weights: readers produce them, the model and the graphs consume them.

Names are the module paths of `export.model.RetNet`; matrices are (outputs, inputs), as torch keeps them. This table is
the only place that derives which weights exist from the configuration.
"""

from __future__ import annotations

import math
from dataclasses import replace

from retnet_export.runtime.bundle.config import ModelConfig


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical weight name with its shape, in the order the forward pass meets them."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, width)}

    def norm(name: str, size: int, kind: str = config.norm) -> None:
        shapes[f"{name}.weight"] = (size,)
        if kind == "layer":
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    if config.embedding_norm:
        norm("embedding_norm", width)
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        norm(f"{layer}.retention_norm", width)
        for name, size in retention_inputs(config).items():
            linear(f"{layer}.retention.{name}", size, width, config.retention_bias)
        if config.head_norm_affine != "none":
            size = config.head_value_dim if config.head_norm_affine == "shared" else config.value_size
            norm(f"{layer}.retention.head_norm", size, config.head_norm)
        linear(f"{layer}.retention.out", width, config.value_size, config.retention_bias)
        norm(f"{layer}.ffn_norm", width)
        if config.ffn == "glu":
            linear(f"{layer}.ffn.gate", config.ffn_size, width, config.ffn_bias)
        linear(f"{layer}.ffn.up", config.ffn_size, width, config.ffn_bias)
        if config.ffn_inner_norm != "none":
            norm(f"{layer}.ffn.inner_norm", config.ffn_size, config.ffn_inner_norm)
        linear(f"{layer}.ffn.down", width, config.ffn_size, config.ffn_bias)
    if config.final_norm:
        norm("norm", width)
    if not config.tied_embeddings:
        linear("head", config.vocab_size, width, bias=False)
    return shapes


def parameters(config: ModelConfig) -> int:
    """Numbers in all weights, as trained. Counted on one layer: a damaged manifest may ask for a billion of them."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(replace(config, num_layers=1)).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
    return sum(sizes.values()) + (config.num_layers - 1) * layer


def retention_inputs(config: ModelConfig) -> dict[str, int]:
    """The projections that read the same normed input, by name with their output width, in the order they are joined."""
    sizes = {"q": config.key_size, "k": config.num_kv_heads * config.head_key_dim, "v": config.num_kv_heads * config.head_value_dim}
    return sizes | {"gate": config.value_size} if config.output_gate else sizes
