"""The baseline on disk: the Transformer for a bundle, in the bundle's own number formats, with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retnet_export.compare.transformer import RandomWeights, TransformerConfig, transformer_like
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from retnet_export.compare.transformer_graph import Lengths
    from retnet_export.graph.weights_file import WeightsFile
    from retnet_export.quantize.formats import Format, Quantized

WEIGHTS = "weights.bin"
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
        quantization: formats of the integer matrices, as options of `quantize`; None if there are none.
    """

    folder: Path
    config: TransformerConfig
    compute: str
    weights: str
    cache: str
    capacity: int
    quantization: Mapping[str, object] | None = None

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
        return (self.folder / WEIGHTS).stat().st_size


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
    if manifest.precision.compute == "bfloat16":
        raise UserError(
            f"{bundle.path}: its products are bfloat16, which ONNX Runtime's CPU attention does not take; "
            "export it with precision=fp32 or fp16 to compare"
        )
    quantization = None
    if manifest.quantization is not None:
        if manifest.quantization.get("activations") is not None:
            raise UserError(
                f"{bundle.path}: its activations are {manifest.quantization['activations']}, which the baseline has no calibrated "
                "ranges for; compare a bundle that was quantized without them"
            )
        quantization = {name: manifest.quantization[name] for name in ("weights", "group_size", "embedding", "head")}
    group = quantization["group_size"] if quantization is not None else None
    return Baseline(
        folder=folder,
        config=transformer_like(manifest.model, kv_heads, group if isinstance(group, int) else 1),
        compute=manifest.precision.compute,
        weights=manifest.precision.weights,
        cache=cache,
        capacity=capacity,
        quantization=quantization,
    )


def write(baseline: Baseline) -> None:
    """Write graphs and weights into the baseline's folder, a tensor in memory at a time.

    Raises:
        UserError: a package is missing, or a group size does not divide a matrix.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", "writing the baseline") from error
    from retnet_export.graph.weights_file import WeightsFile

    with tempfile.TemporaryDirectory(dir=baseline.folder) as aside, WeightsFile(baseline.folder / WEIGHTS) as weights:
        if baseline.quantization is None:
            graphs = _build(baseline, weights)
        else:
            with WeightsFile(Path(aside) / WEIGHTS) as floats:
                graphs = _build(baseline, floats)
            _quantize(list(graphs.values()), baseline.quantization, weights)
        for path, graph in graphs.items():
            ir.save(graph, path)


def _build(baseline: Baseline, weights: WeightsFile) -> dict[Path, ir.Model]:
    from retnet_export.compare.transformer_graph import build_transformer

    scale = baseline.cache_scale if baseline.cache == "int8" else None
    options = (baseline.config, RandomWeights(baseline.config), weights, baseline.compute, baseline.capacity)
    return {path: build_transformer(*options, lengths=lengths, cache_scale=scale) for path, lengths in baseline.graphs.items()}


def _quantize(graphs: Sequence[ir.Model], quantization: Mapping[str, object], weights: WeightsFile) -> None:
    """Give the baseline's matrices the formats that the bundle's have, by the rewrite that made the bundle."""

    from retnet_export.graph.loading import tensor_of
    from retnet_export.quantize.options import QuantizeOptions
    from retnet_export.quantize.rewrite import matrices, quantize_graph
    from retnet_export.quantize.store import MatrixStore

    options = QuantizeOptions(**quantization)  # type: ignore[arg-type]
    store = MatrixStore(weights)
    for name, role in matrices(graphs[0]).items():
        matrix = tensor_of(graphs[0], name).numpy()
        form = options.format_of(role, str(matrix.dtype))
        if form is not None:
            store.put(name, role, rounded(matrix.T if role in ("embedding", "tied") else matrix, form))
    for graph in graphs:
        quantize_graph(graph, store.stored)
        weights.take_over(graph)


def rounded(weight: NDArray[np.generic], form: Format) -> Quantized:
    """A matrix (inputs, outputs) in a format, the largest weight of each group kept: random weights deserve no better."""
    from retnet_export.quantize.formats import Quantized

    inputs, outputs = weight.shape
    groups = np.asarray(weight, np.float32).reshape(-1, form.group(inputs), outputs)
    scales = (np.abs(groups).max(axis=1) / form.largest).astype(form.scale_dtype).astype(np.float32)
    values = np.rint(groups / scales[:, None]).clip(-form.largest, form.largest).astype(np.int8)
    return Quantized(form, values.reshape(inputs, outputs), scales)
