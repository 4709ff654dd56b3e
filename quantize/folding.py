"""AWQ's factors, folded into what stands before a matrix: no node is added, and the float model computes what it did.

norm(x)·w @ W  =  norm(x)·(w / s) @ (diag(s) W)
(act(g)·u) @ W =  (act(g)·(u / s)) @ (diag(s) W),  where u is a linear layer, whose outputs are divided
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retnet_export.quantize.formats import Format
from retnet_export.quantize.methods import Gram, Method
from retnet_export.runtime.bundle.config import ModelConfig

Weights = dict[str, np.ndarray[Any, Any]]


def fold_input_scales(
    config: ModelConfig, layer: str, weights: Weights, grams: dict[str, Gram], formats: Mapping[str, Format], method: Method
) -> Weights:
    """Scale the inputs of a layer's matrices, in place, from the last matrix to the first.

    The output projection's input is divided by nothing unless the heads' norm has a weight for each head: a weight that heads
    share would have to carry one factor for all of them.

    Args:
        config: the architecture.
        layer: "layers.3".
        weights: the layer's weights by name; changed.
        grams: XᵀX of each matrix's inputs; changed alike.
        formats: of each matrix.
        method: says by how much.

    Returns:
        The vectors that have changed.
    """
    changed: Weights = {}
    for matrix, vectors, columns in _producers(config, layer, weights):
        scales = method.input_scales(weights[matrix].astype(np.float32), formats[matrix], grams[matrix])
        if scales is None:
            continue
        weights[matrix] = (weights[matrix] * scales[:, None]).astype(weights[matrix].dtype)
        grams[matrix] = grams[matrix] / np.outer(scales, scales)
        for name in vectors:
            weights[name] = (weights[name] / scales.reshape(weights[name].shape)).astype(np.float32)
            changed[name] = weights[name]
        if columns is not None:
            source, bias = columns
            weights[source] = weights[source].copy()
            weights[source][:, -len(scales) :] /= scales.astype(weights[source].dtype)
            if bias in weights:
                weights[bias] = weights[bias].copy()
                weights[bias][-len(scales) :] /= scales
                changed[bias] = weights[bias]
    return changed


def _producers(config: ModelConfig, layer: str, weights: Weights) -> list[tuple[str, list[str], tuple[str, str] | None]]:
    """Matrices whose inputs can be scaled: name, the norm vectors to divide, and the linear layer whose last outputs to divide."""

    def vectors(norm: str) -> list[str]:
        return [name for name in (f"{norm}.weight", f"{norm}.bias") if name in weights]

    up = f"{layer}.ffn.gate_up" if config.ffn == "glu" else f"{layer}.ffn.up"
    found: list[tuple[str, list[str], tuple[str, str] | None]] = []
    if config.ffn_inner_norm != "none":
        found.append((f"{layer}.ffn.down.weight", vectors(f"{layer}.ffn.inner_norm"), None))
    elif config.ffn == "glu":
        found.append((f"{layer}.ffn.down.weight", [], (f"{up}.weight", f"{up}.bias")))
    found.append((f"{up}.weight", vectors(f"{layer}.ffn_norm"), None))
    if config.head_norm_affine == "per_head":
        found.append((f"{layer}.retention.out.weight", vectors(f"{layer}.retention.head_norm"), None))
    found.append((f"{layer}.retention.projections.weight", vectors(f"{layer}.retention_norm"), None))
    return found
