"""The weights that a bundle computes with, by their canonical names, read by NumPy alone: what the oracle judges a backend by."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from retnet_export.graph.blocks import rotated_projection_order
from retnet_export.graph.weights import retention_inputs
from retnet_export.runtime.backends.cuda.sources import MatrixSource, find_sources
from retnet_export.runtime.bundle.bundle import Bundle

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def canonical(bundle: Bundle) -> dict[str, np.ndarray]:
    config, folder, sources = bundle.manifest.model, bundle.path, find_sources(bundle)
    weights = {
        name: np.fromfile(folder / stored.location, np.float32, math.prod(stored.shape), offset=stored.offset).astype(np.float64)
        for name, stored in sources.vectors.items()
        if stored.element_type == 1 and name.endswith((".weight", ".bias")) and (len(stored.shape) == 1 or "head_norm" in name)
    }
    order = rotated_projection_order(config)
    for index, layer in enumerate(sources.layers):
        name = f"layers.{index}"
        joined = {"weight": _in_order(order, dense(folder, layer["projections"]))}
        if f"{name}.retention.projections.bias" in weights:
            joined["bias"] = _in_order(order, weights.pop(f"{name}.retention.projections.bias"))
        for what, array in joined.items():
            parts = np.split(array, np.cumsum([*retention_inputs(config).values()])[:-1])
            weights |= {f"{name}.retention.{part}.{what}": each for part, each in zip(retention_inputs(config), parts, strict=True)}
        weights[f"{name}.retention.out.weight"] = dense(folder, layer["out"])
        weights[f"{name}.ffn.down.weight"] = dense(folder, layer["down"])
        joined = {"weight": dense(folder, layer["up"])}
        if f"{name}.ffn.gate_up.bias" in weights:
            joined["bias"] = weights.pop(f"{name}.ffn.gate_up.bias")
        for what, array in joined.items():
            if config.ffn == "glu":
                weights[f"{name}.ffn.gate.{what}"], weights[f"{name}.ffn.up.{what}"] = np.split(array, 2)
            else:
                weights[f"{name}.ffn.up.{what}"] = array
    weights["embedding.weight"] = dense(folder, sources.embedding)
    if not config.tied_embeddings:
        weights["head.weight"] = dense(folder, sources.head)
    return weights


def dense(folder: Path, source: MatrixSource) -> np.ndarray:
    """A matrix as float64 (N, K)."""
    layout, path = source.layout, folder / source.values.location
    shape = (layout.rows, layout.columns) if source.by_rows else (layout.columns, layout.rows)
    count = layout.rows * layout.columns
    if not layout.integer:
        values = np.fromfile(path, DTYPES[layout.kind], count, offset=source.values.offset).astype(np.float64).reshape(shape)
        return values if source.by_rows else values.T
    content = np.fromfile(path, np.uint8, _bytes(layout.kind, count), offset=source.values.offset)
    if layout.kind == "int4":
        digits = (np.stack([content & 15, content >> 4], -1).reshape(-1) ^ 8).astype(np.int64) - 8
    else:
        digits = content.view(np.int8).astype(np.int64)
    values = digits.reshape(shape) if source.by_rows else digits.reshape(shape).T
    stored = source.scales
    scales = np.fromfile(folder / stored.location, DTYPES[layout.scale], math.prod(stored.shape), offset=stored.offset)
    scales = scales.astype(np.float64)
    if layout.group_size is None:
        return values * scales[:, None]
    grouped = scales.reshape(layout.rows, -1) if source.by_rows else scales.reshape(-1, layout.rows).T
    return values * np.repeat(grouped, layout.group_size, 1)


def _bytes(kind: str, count: int) -> int:
    return count if kind == "int8" else count // 2


def _in_order(order: np.ndarray, joined: np.ndarray) -> np.ndarray:
    canonical = np.empty_like(joined)
    canonical[order] = joined
    return canonical
