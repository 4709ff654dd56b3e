"""The canonical names and shapes of a RetNet's weights: readers produce them, the model and the graphs consume them.

Names are the module paths of `export.model.RetNet`; matrices are (outputs, inputs), as torch keeps them. This table is
the only place that derives which weights exist from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import first_not_finite

Array = NDArray[np.generic]
ReadWeight = Callable[[str], Array]
"""Reads one weight by its canonical name; called once per weight, so that only one need be in memory."""


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


def narrowed(name: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """A weight in the format that the bundle stores, without a copy if it is in it already.

    Raises:
        UserError: a value is too large for the format; the message names the weight, the value and what holds it.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(dtype, copy=False)
    if stored is not array and (first := first_not_finite(stored)) is not None:
        index = [int(position) for position in np.unravel_index(first, array.shape)]
        value = float(array.reshape(-1)[first])
        if np.isfinite(value):
            raise UserError(
                f"{name} holds {value:.6g} at {index}, more than {dtype.name} can hold; export it with "
                + ("--precision fp32 or bf16" if dtype.name == "float16" else "a checkpoint of smaller weights")
            )
    return stored


def retention_inputs(config: ModelConfig) -> dict[str, int]:
    """The projections that read the same normed input, by name with their output width, in the order they are joined."""
    sizes = {
        "q": config.key_size,
        "k": config.num_kv_heads * config.head_key_dim,
        "v": config.num_kv_heads * config.head_value_dim,
    }
    return sizes | {"gate": config.value_size} if config.output_gate else sizes


def random_weights(config: ModelConfig, seed: int = 0, dtype: type[np.floating] = np.float32) -> Mapping[str, Array]:
    """Random weights that keep activations near unit scale: for tests and for benchmarks, whose speed does not depend on them.

    Norm weights and biases are random too, so that a forgotten one shows.
    """
    generator = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 2:
            deviation = 1.0 if name == "embedding.weight" else shape[1] ** -0.5
            value = generator.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        else:
            value = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
            if name.endswith(".weight"):
                value += np.float32(1.0)
        weights[name] = value.astype(dtype)
    return weights
