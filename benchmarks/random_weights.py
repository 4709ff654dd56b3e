"""A model of random weights, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from retnet_export.graph.weights import Array, weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig


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
