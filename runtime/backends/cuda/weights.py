"""A bundle's weights on the device, in the layout of layout.py: where each one is, and the vectors that go with the matrices.

Rule: the device holds the weights once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.layout import BITS, MatrixLayout, source_rows
from retnet_export.runtime.backends.cuda.loader import Files, Loader
from retnet_export.runtime.backends.cuda.plan import PRODUCTS
from retnet_export.runtime.backends.cuda.sources import Sources, find_sources, product_names, vector_sizes
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.device import cuda

ALIGNMENT = 256


@dataclass(frozen=True)
class Places:
    """Where on the device everything is, as offsets into one buffer.

    Attributes:
        layer_bytes: from one layer's matrices to the next layer's.
        bases: of each product in a layer.
        head: the head.
        embedding: the embedding; the head's if tied.
        vectors: float32 vectors, layer by layer, then the model's.
        phases: uint32, how far each rotary pair turns a token.
        bytes: of everything.
    """

    layer_bytes: int
    bases: Mapping[str, int]
    head: int
    embedding: int
    vectors: int
    phases: int
    bytes: int


class DeviceWeights:
    """A bundle's weights on the device.

    Args:
        config: the model.
        folder: of the files that the sources name.
        sources: where everything is.

    Attributes:
        sources: where they came from, with their layouts.
        places: where they are.
        layer_vectors, model_vectors: where the vectors are, in floats from `places.vectors`.
        loaded_bytes, load_seconds: what was read, and how long it took.
    """

    def __init__(self, config: ModelConfig, folder: Path, sources: Sources) -> None:
        self.config, self._folder, self.sources = config, folder, sources
        self.layer_vectors, self.model_vectors = vector_sizes(self.config, self.sources)
        self.places = self._place()
        self.loaded_bytes, self.load_seconds = 0, 0.0
        self._buffer: cuda.DeviceBuffer | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> DeviceWeights:
        """Those of a bundle, found and not yet loaded.

        Raises:
            UnsupportedError: one is stored in a way that the kernels do not read.
        """
        folder = bundle.file(bundle.manifest.graphs["decode"].file).parent
        return cls(bundle.manifest.model, folder, find_sources(bundle))

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return self.places.bytes

    @property
    def largest(self) -> int:
        """Bytes of the largest matrix as the bundle stores it: what loading needs besides."""
        everything = [*self.sources.layers[0].values(), self.sources.head, self.sources.embedding]
        return max(each.layout.rows * each.layout.columns * BITS[each.layout.kind] // 8 for each in everything)

    def address(self, offset: int) -> int:
        """The device address of an offset of `places`."""
        assert self._buffer is not None
        return self._buffer.address + offset

    def _place(self) -> Places:
        bases, end = {}, 0

        def after(size: int) -> int:
            nonlocal end
            start = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
            return start

        for name in PRODUCTS[:4]:
            bases[name] = after(self.sources.layouts[name].bytes)
        layer_bytes = end
        end *= self.config.num_layers
        head = after(self.sources.head.layout.bytes)
        embedding = head if self.sources.embedding is self.sources.head else after(self.sources.embedding.layout.bytes)
        vectors = after(4 * (self.layer_vectors.size * self.config.num_layers + self.model_vectors.size))
        phases = after(4 * (self.config.head_key_dim // 2))
        return Places(layer_bytes, bases, head, embedding, vectors, phases, end)

    def load(self, stream: cuda.Stream, capability: tuple[int, int]) -> None:
        """Allocate, read and lay out everything.

        Raises:
            CudaMemoryError: it does not fit.
            UserError: a file is too short.
        """
        began = time.perf_counter()
        self._buffer = cuda.DeviceBuffer(self.places.bytes)
        loader = Loader(self._folder, stream, capability, self.largest)
        for index, layer in enumerate(self.sources.layers):
            for name, source in layer.items():
                loader.matrix(source, self.address(index * self.places.layer_bytes + self.places.bases[name]))
        loader.matrix(self.sources.head, self.address(self.places.head))
        if self.places.embedding != self.places.head:
            loader.matrix(self.sources.embedding, self.address(self.places.embedding))
        vectors = self._read_vectors()
        stream.copy_to_device(self._buffer, vectors, self.places.vectors)
        phases = phase_per_token(self.config)
        stream.copy_to_device(self._buffer, phases, self.places.phases)
        stream.synchronize()
        self.loaded_bytes, self.load_seconds = loader.bytes, time.perf_counter() - began

    def _read_vectors(self) -> NDArray[np.float32]:
        files, config, sources = Files(self._folder), self.config, self.sources
        size, names = self.layer_vectors.size, product_names(config)
        all_vectors = np.zeros(size * config.num_layers + self.model_vectors.size, np.float32)
        for index in range(config.num_layers):
            prefix, at = f"layers.{index}.", all_vectors[index * size : (index + 1) * size]
            for name, offset in self.layer_vectors.offsets.items():
                product, _, what = name.partition(".")
                if product in names and what == "scales":
                    source = sources.layers[index][product]
                    assert source.scales is not None
                    value = _by_device_row(source.layout, files.floats(source.scales).reshape(-1))
                elif product in names and what == "bias":
                    stored = sources.vectors[f"{prefix}{names[product]}.bias"]
                    value = _by_device_row(sources.layouts[product], files.floats(stored).reshape(-1))
                else:
                    value = files.floats(sources.vectors[prefix + name]).reshape(-1)
                at[offset : offset + value.size] = value
        gamma = config.gamma
        computed = {
            "gamma": gamma,
            "log_gamma": np.log(gamma),
            "eps_per_head": config.head_norm_eps / config.score_scale**2 / (1 - gamma),
        }
        at = all_vectors[size * config.num_layers :]
        for name, offset in self.model_vectors.offsets.items():
            if name in computed:
                value = computed[name].astype(np.float32)
            elif name.endswith(".scales"):
                source = sources.head if name == "head.scales" else sources.embedding
                assert source.scales is not None
                value = files.floats(source.scales).reshape(-1)
            else:
                value = files.floats(sources.vectors[name]).reshape(-1)
            at[offset : offset + value.size] = value
        return all_vectors


def _by_device_row(layout: MatrixLayout, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A value for each output, in the order of the rows on the device; zeros for padding."""
    rows = source_rows(layout)
    ordered = np.zeros(layout.padded_rows, np.float32)
    ordered[rows >= 0] = values[rows[rows >= 0]]
    return ordered


def phase_per_token(config: ModelConfig) -> NDArray[np.uint32]:
    """How far each rotary pair turns a token, (Dk/2,), in parts of 2^32 of a turn: as graph/blocks.py writes it."""
    return np.asarray(np.rint(config.theta / (2 * np.pi) * 2**32).astype(np.int64) & 0xFFFFFFFF, np.uint32)
