"""Models small enough to run thousands of times: one configuration for every way the families differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from random_weights import random_weights

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.model import Model


def config(**changes: object) -> ModelConfig:
    """Two layers, with sizes that are all different, so that a wrong axis shows."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "head_key_dim": 8,
        "head_value_dim": 12,
        "ffn_size": 48,
        "num_kv_heads": 4,
    }
    return ModelConfig(**(sizes | changes))


CONFIGS: Mapping[str, ModelConfig] = {
    "fla": config(),
    "fla, square heads": config(head_value_dim=8),
    "fla, two queries a key, tied": config(num_kv_heads=2, tied_embeddings=True, ffn_activation="gelu"),
    "fla, one key for all, no gate": config(num_kv_heads=1, output_gate=False, final_norm=False),
    "torchscale": config(
        rotary_layout="interleaved",
        rotary_spacing="inclusive",
        scaled="key",
        score_norm=True,
        head_norm_affine="none",
        embedding_scale=32**0.5,
    ),
    "torchscale, deepnorm, layer norms": config(
        rotary_layout="interleaved",
        rotary_spacing="inclusive",
        scaled="key",
        score_norm=True,
        head_norm_affine="none",
        norm="layer",
        post_norm=True,
        residual_scale=4**0.25,
        ffn="mlp",
        ffn_bias=True,
        ffn_activation="relu",
        ffn_inner_norm="layer",
        embedding_norm=True,
    ),
    "jamie-stirling": config(
        decay="log_spaced",
        rotary_layout="interleaved",
        scaled="none",
        head_norm="layer",
        head_norm_affine="per_head",
        head_norm_eps=1e-5,
        retention_bias=True,
        ffn="mlp",
        ffn_bias=True,
        ffn_activation="gelu",
        norm="layer",
        tied_embeddings=True,
    ),
}


def bundle(folder: Path, model: ModelConfig, weights: Mapping[str, NDArray[np.generic]] | None = None, **options: object) -> Bundle:
    """A bundle of random weights (or of those given) in `folder`/tiny.retnet; `options` are those of the export."""
    weights = random_weights(model) if weights is None else weights
    checkpoint = Checkpoint(path=folder, family="random", config=model, weight=weights.__getitem__, files=())
    return export_bundle(checkpoint, folder / "tiny.retnet", ExportOptions(**options))


def model(made: Bundle, variant: str, **options: object) -> Model:
    """A bundle on ONNX Runtime's CPU provider, with one variant of its graphs."""
    return Model(made, OnnxRuntimeBackend(made, variant=variant, **options))
