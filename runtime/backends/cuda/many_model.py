"""The kernels for many rows on a bundle's weights: where each matrix and vector is, and modules compiled when first needed.

A module has the products of one width, or everything else; a batch of eight needs two of them, so a first step or prompt waits for
no kernel that it does not use.
"""

from __future__ import annotations

from retnet_export.runtime.backends.cuda.compiler import compile_text
from retnet_export.runtime.backends.cuda.launches import DeviceMatrix, DeviceModel, Launch
from retnet_export.runtime.backends.cuda.layout import MatrixLayout
from retnet_export.runtime.backends.cuda.many_source import Limits, ManySource
from retnet_export.runtime.backends.cuda.plan import DeviceLimits
from retnet_export.runtime.backends.cuda.sources import product_names
from retnet_export.runtime.backends.cuda.weights import DeviceWeights
from retnet_export.runtime.device import cuda, kernels

RESERVED_BYTES = 1024
"""Shared memory of a block that CUDA keeps for itself, or that kernels declare apart from what they ask for."""


def layouts_by_name(weights: DeviceWeights) -> dict[str, MatrixLayout]:
    """How every matrix lies, by its name in the graphs."""
    sources, names = weights.sources, product_names(weights.config)
    layouts = {
        f"layers.{index}.{name}.weight": sources.layouts[product]
        for index in range(weights.config.num_layers)
        for product, name in names.items()
    }
    layouts["embedding.weight"] = sources.embedding.layout
    return layouts if sources.head is sources.embedding else {**layouts, "head.weight": sources.head.layout}


def many_source(weights: DeviceWeights, limits: DeviceLimits) -> ManySource:
    """The source of the kernels that read these weights."""
    shared = Limits(limits.shared_bytes - RESERVED_BYTES, limits.multiprocessors)
    return ManySource(weights.config, layouts_by_name(weights), shared)


def device_model(weights: DeviceWeights, source: ManySource) -> DeviceModel:
    """Loaded weights by the names of the graphs, with the source of the kernels that read them."""
    config, places, sources = weights.config, weights.places, weights.sources
    names = product_names(config)
    layer_floats = weights.layer_vectors.size
    model_vectors = places.vectors + 4 * layer_floats * config.num_layers
    matrices, vectors = {}, {}

    def row_scales(name: str) -> int:
        offset = weights.model_vectors[name]
        return 0 if offset < 0 else weights.address(model_vectors + 4 * offset)

    for index in range(config.num_layers):
        at = weights.address(places.vectors + 4 * layer_floats * index)
        for product, name in names.items():
            scales = weights.layer_vectors[f"{product}.scales"]
            matrices[f"layers.{index}.{name}.weight"] = DeviceMatrix(
                sources.layouts[product],
                weights.address(index * places.layer_bytes + places.bases[product]),
                0 if scales < 0 else at + 4 * scales,
            )
        for name, offset in weights.layer_vectors.offsets.items():
            product, _, what = name.partition(".")
            if product in names and what in ("bias", "scales"):
                name = f"{names[product]}.{what}"
            vectors[f"layers.{index}.{name}"] = at + 4 * offset
    for name, offset in weights.model_vectors.offsets.items():
        vectors[name] = weights.address(model_vectors + 4 * offset)
    tied = places.embedding == places.head
    matrices["embedding.weight"] = DeviceMatrix(
        sources.embedding.layout, weights.address(places.embedding), row_scales("head.scales" if tied else "embedding.scales")
    )
    if not tied:
        matrices["head.weight"] = DeviceMatrix(sources.head.layout, weights.address(places.head), row_scales("head.scales"))
    return DeviceModel(source, matrices, vectors)


class ManyKernels:
    """Puts launches on a stream, compiling what is not compiled yet.

    Args:
        source: of the kernels.
        stream: where launches go.
        limits: of the GPU.
        ptx: whether to compile to intermediate code, which the driver translates.
    """

    def __init__(self, source: ManySource, stream: cuda.Stream, limits: DeviceLimits, *, ptx: bool = False) -> None:
        self._source, self._stream, self._limits, self._ptx = source, stream, limits, ptx
        self._modules: dict[int, kernels.Module] = {}
        self._functions: dict[str, kernels.Function] = {}

    def __call__(self, launch: Launch) -> None:
        key = f"{launch.kernel} {launch.width}"
        if key not in self._functions:
            self._functions[key] = self._module(launch.width).function(launch.kernel, launch.shared)
        self._functions[key].launch_after(
            self._stream, launch.grid, launch.threads, kernels.Arguments(launch.parameters), overlaps=launch.overlaps
        )

    def _module(self, width: int) -> kernels.Module:
        if width not in self._modules:
            name = f"products of {width} rows" if width else "rows and retention"
            compiled = compile_text(name.replace(" ", "_"), self._source.text(width), self._limits.capability, ptx=self._ptx)
            self._modules[width] = kernels.Module(compiled.image)
        return self._modules[width]
