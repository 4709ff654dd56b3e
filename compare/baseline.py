"""The baseline on disk: the Transformer for a bundle, in the bundle's own number formats, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_export.compare.transformer import RandomWeights, TransformerConfig, transformer_like
from retnet_export.runtime.bundle import Bundle
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from retnet_export.compare.transformer_graph import Lengths

CACHE_SCALE = 1 / 24
"""Step of an INT8 cache: covers ±5.3 for keys and values of unit variance, as random weights give them."""


@dataclass(frozen=True)
class Baseline:
    """A written baseline.

    Attributes:
        folder: graphs and weights; temporary.
        config: the architecture.
        compute: "float32" or "float16", as the bundle's.
        weights: how matrices are stored, as the bundle's.
        cache: "compute", in which the cache is as wide as the operands of products, or "int8".
        capacity: the longest sequence.
    """

    folder: Path
    config: TransformerConfig
    compute: str
    weights: str
    cache: str
    capacity: int

    @property
    def graph(self) -> Path:
        """The graph this project runs."""
        return self.folder / "transformer.onnx"

    @property
    def genai_graph(self) -> Path:
        """The same graph with lengths from an attention mask, for onnxruntime-genai."""
        return self.folder / "model.onnx"

    @property
    def graphs(self) -> Mapping[Path, Lengths]:
        """Both, with how each learns the lengths of its sequences."""
        return {self.graph: "given", self.genai_graph: "mask"}

    @property
    def cache_dtype(self) -> np.dtype[np.generic]:
        """Element type of the cache."""
        return np.dtype(np.int8 if self.cache == "int8" else self.compute)

    @property
    def cache_scale(self) -> float:
        """What one step of the cache's numbers stands for."""
        return CACHE_SCALE if self.cache == "int8" else 1.0

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes."""
        return self.config.cache_bytes(1, self.cache_dtype.itemsize)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights file."""
        return (self.folder / "weights.bin").stat().st_size


def baseline_for(bundle: Bundle, folder: Path, *, capacity: int, kv_heads: int | None = None, cache: str = "compute") -> Baseline:
    """Describe the Transformer for a bundle; `write` makes its files.

    Args:
        bundle: gives the architecture and the number formats.
        folder: where its files will be.
        capacity: the longest sequence that will be measured.
        kv_heads: heads of keys and values; as many as query heads when None.
        cache: "compute" or "int8".

    Raises:
        UserError: there is no such baseline (see `transformer_like`), or the bundle's formats have no counterpart in it.
    """
    manifest = bundle.manifest
    if manifest.quantization is not None:
        raise UserError(f"{bundle.path}: quantized bundles cannot be compared yet; compare the bundle it was made from")
    if manifest.precision.compute == "bfloat16":
        raise UserError(
            f"{bundle.path}: its products are bfloat16, which ONNX Runtime's CPU attention does not take; "
            "export with --precision fp32 or fp16 to compare"
        )
    config = transformer_like(manifest.model, kv_heads)
    return Baseline(folder, config, manifest.precision.compute, manifest.precision.weights, cache, capacity)


def write(baseline: Baseline) -> None:
    """Write graphs and weights into the baseline's folder, a tensor in memory at a time."""
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", "writing the baseline") from error
    from retnet_export.compare.transformer_graph import build_transformer
    from retnet_export.graph.weights_file import WeightsFile

    read = RandomWeights(baseline.config)
    scale = baseline.cache_scale if baseline.cache == "int8" else None
    with WeightsFile(baseline.folder / "weights.bin") as weights:
        for path, lengths in baseline.graphs.items():
            graph = build_transformer(
                baseline.config, read, weights, baseline.compute, baseline.capacity, lengths=lengths, cache_scale=scale
            )
            ir.save(graph, path)
