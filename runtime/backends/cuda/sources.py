"""Where a bundle's weights are in its files, and how each is to lie on the device: found in the portable graph.

Rule: what the kernels do not read is refused here, by name, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retnet_export.runtime.backends.cuda.layout import FloatKind, Kind, MatrixLayout
from retnet_export.runtime.backends.cuda.plan import Vectors, place_vectors
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.external_data import StoredInitializer, stored_initializers
from retnet_export.runtime.errors import UserError

FLOATS: Mapping[int, FloatKind] = {1: "float32", 10: "float16", 16: "bfloat16"}
"""By ONNX's number of the element type."""


class UnsupportedError(UserError):
    """Something about a bundle that this backend cannot do; another backend can."""


@dataclass(frozen=True)
class MatrixSource:
    """One matrix in the bundle, and how it is to lie on the device.

    Attributes:
        layout: on the device.
        values: where its weights are.
        by_rows: whether they are (N, K), as in an embedding, instead of (K, N).
        scales: where its scales are: (N,), by group (K / g, N), or of an embedding (V, K / g, 1).
    """

    layout: MatrixLayout
    values: StoredInitializer
    by_rows: bool
    scales: StoredInitializer | None = None


@dataclass(frozen=True)
class Sources:
    """Everything that the kernels need of a bundle.

    Attributes:
        layers: of each layer, the matrices by product.
        head: the output head.
        embedding: the embedding; the head itself if tied.
        vectors: every small tensor of the graph by name.
    """

    layers: tuple[Mapping[str, MatrixSource], ...]
    head: MatrixSource
    embedding: MatrixSource
    vectors: Mapping[str, StoredInitializer]

    @property
    def layouts(self) -> dict[str, MatrixLayout]:
        """Of the five products; those of the first layer are those of all."""
        return {**{name: source.layout for name, source in self.layers[0].items()}, "head": self.head.layout}


def find_sources(bundle: Bundle) -> Sources:
    """Find a bundle's matrices and vectors in its decode graph.

    Raises:
        UnsupportedError: one is stored in a way that the kernels do not read.
    """
    config, path = bundle.manifest.model, bundle.file(bundle.manifest.graphs["decode"].file)
    stored = {each.name: each for each in stored_initializers(path.read_bytes())}

    def matrix(name: str, rows: int, columns: int, interleaved: bool = False) -> MatrixSource:
        return _matrix(path, stored, f"{name}.weight", rows, columns, interleaved)

    keys = 2 * (config.num_heads + config.num_kv_heads) * (config.head_key_dim // 2)
    projected = keys + config.num_kv_heads * config.head_value_dim + (config.value_size if config.output_gate else 0)
    glu = config.ffn == "glu"
    layers = []
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        layers.append(
            {
                "projections": matrix(f"{layer}.retention.projections", projected, config.hidden_size),
                "out": matrix(f"{layer}.retention.out", config.hidden_size, config.value_size),
                "up": matrix(f"{layer}.ffn.{'gate_up' if glu else 'up'}", config.ffn_size * (1 + glu), config.hidden_size, glu),
                "down": matrix(f"{layer}.ffn.down", config.hidden_size, config.ffn_size),
            }
        )
        for name, source in layers[index].items():
            if source.layout != layers[0][name].layout:
                raise UnsupportedError(f"{path}: the product {name!r} is stored differently in layer {index} than in layer 0")
    embedding = matrix("embedding", config.vocab_size, config.hidden_size)
    head = embedding if config.tied_embeddings else matrix("head", config.vocab_size, config.hidden_size)
    return Sources(tuple(layers), head, embedding, stored)


def _matrix(
    path: Path, stored: Mapping[str, StoredInitializer], name: str, rows: int, columns: int, interleaved: bool
) -> MatrixSource:
    if name in stored:
        values = stored[name]
        if values.element_type not in FLOATS:
            raise UnsupportedError(
                f"{path}: {name} has ONNX element type {values.element_type}, which the backend 'cuda' does not read"
            )
        layout = MatrixLayout(rows, columns, FLOATS[values.element_type], interleaved=interleaved)
        return MatrixSource(layout, values, name == "embedding.weight")
    for kind in ("int8", "int4"):
        for values_name, scales_name, by_rows in (
            (f"{name}.{kind}", f"{name}.scale", name == "embedding.weight"),
            (f"{name}.{kind}_words", f"{name}.row_scale", True),
        ):
            if values_name in stored and scales_name in stored:
                scales = stored[scales_name]
                count = math.prod(scales.shape)
                group = None if count == rows else columns * rows // count
                if group is not None and group % 16:
                    raise UnsupportedError(f"{path}: {name} has groups of {group} inputs, the backend 'cuda' reads multiples of 16")
                layout = MatrixLayout(rows, columns, _kind(kind), group, FLOATS[scales.element_type], interleaved)
                return MatrixSource(layout, stored[values_name], by_rows, scales)
    like = sorted(other for other in stored if other.startswith(name))
    raise UnsupportedError(f"{path}: {name} is stored as {', '.join(like) or 'nothing'}, which the backend 'cuda' does not read")


def _kind(name: str) -> Kind:
    return "int8" if name == "int8" else "int4"


def vector_sizes(config: ModelConfig, sources: Sources) -> tuple[Vectors, Vectors]:
    """Where the vectors of a layer and of the model lie, by the names of plan.py."""
    layer: dict[str, int] = {}
    prefix = "layers.0."
    for name, stored in sources.vectors.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short.endswith((".weight", ".bias")) and "norm" in short:
            layer[short] = math.prod(stored.shape)
    for product, name in product_names(config).items():
        layout = sources.layouts[product]
        if f"{prefix}{name}.bias" in sources.vectors:
            layer[f"{product}.bias"] = layout.padded_rows
        if layout.has_row_scales:
            layer[f"{product}.scales"] = layout.padded_rows
    model = {
        name: math.prod(stored.shape)
        for name, stored in sources.vectors.items()
        if name in ("embedding_norm.weight", "embedding_norm.bias", "norm.weight", "norm.bias")
    }
    if sources.head.layout.has_row_scales:
        model["head.scales"] = sources.head.layout.padded_rows
    if sources.embedding.layout.has_row_scales and sources.embedding is not sources.head:
        model["embedding.scales"] = sources.embedding.layout.padded_rows
    model |= {"gamma": config.num_heads, "log_gamma": config.num_heads, "eps_per_head": config.num_heads}
    return place_vectors(layer), place_vectors(model)


def product_names(config: ModelConfig) -> Mapping[str, str]:
    """The products of a layer as the graphs name them."""
    up = "ffn.gate_up" if config.ffn == "glu" else "ffn.up"
    return {"projections": "retention.projections", "out": "retention.out", "up": up, "down": "ffn.down"}
