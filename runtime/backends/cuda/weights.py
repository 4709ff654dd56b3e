"""A bundle's weights on the device, in the layout of layout.py: found in the portable graph, brought there a matrix at a time.

Rule: the device holds the weights once and, while loading, one matrix more; the host holds two pieces of a file. A matrix goes as
the file has it through pinned memory to the device, where a kernel puts each weight in its place.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.compiler import compile_kernels
from retnet_export.runtime.backends.cuda.layout import BITS, FloatKind, Kind, MatrixLayout, source_rows
from retnet_export.runtime.backends.cuda.plan import KINDS, PRODUCTS, Vectors, place_vectors
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.external_data import StoredInitializer, stored_initializers
from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError

FLOATS: Mapping[int, FloatKind] = {1: "float32", 10: "float16", 16: "bfloat16"}
"""By ONNX's number of the element type."""
STAGING_BYTES = 32 << 20
ALIGNMENT = 256
NAMES: Mapping[str, tuple[str, ...]] = {
    "projections": ("retention.projections",),
    "out": ("retention.out",),
    "up": ("ffn.gate_up", "ffn.up"),
    "down": ("ffn.down",),
}
"""The products of a layer as the graphs name them."""


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
    for product, names in NAMES.items():
        layout = sources.layouts[product]
        if any(f"{prefix}{name}.bias" in sources.vectors for name in names):
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


class _Files:
    """The bundle's files, read piece by piece."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bytes = 0

    def read(self, stored: StoredInitializer) -> NDArray[np.generic]:
        """A small tensor whole."""
        kind = {1: np.float32, 10: np.float16, 16: np.uint16}[stored.element_type]
        array = np.fromfile(self._path(stored), kind, math.prod(stored.shape), offset=stored.offset)
        if array.size != math.prod(stored.shape):
            raise UserError(f"{self._path(stored)}: too short for {stored.name}; the bundle is damaged: copy or export it again")
        self.bytes += array.nbytes
        return array.reshape(stored.shape)

    def floats(self, stored: StoredInitializer) -> NDArray[np.float32]:
        """A small tensor as float32."""
        array = self.read(stored)
        if stored.element_type == 16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def _path(self, stored: StoredInitializer) -> Path:
        return self._folder / stored.location


class _MatrixStructure(ctypes.Structure):
    """`Matrix` of load.cu."""

    _fields_ = (
        ("source", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("run_bytes", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("kind", "rows", "columns", "padded_rows", "runs", "by_rows", "interleaved")),
        *((name, ctypes.c_int) for name in ("grain", "group", "scale_bytes")),
    )


class Loader:
    """Brings matrices to the device, one after another.

    Args:
        folder: of the bundle.
        stream: what copies and kernels run on.
        capability: of the GPU.
        largest: bytes of the largest matrix as the file has it.
    """

    def __init__(self, folder: Path, stream: cuda.Stream, capability: tuple[int, int], largest: int) -> None:
        self._folder, self._stream = folder, stream
        module = kernels.Module(compile_kernels("load.cu", {}, capability).image)
        self._values, self._scales = module.function("lay_out"), module.function("lay_out_scales")
        self._scratch = cuda.DeviceBuffer(largest)
        self._staging = [cuda.pinned((min(STAGING_BYTES, max(largest, 1)),), np.uint8) for _ in range(2)]
        self._copied = [cuda.Event() for _ in range(2)]
        self._turn = 0
        self.bytes = 0

    def matrix(self, source: MatrixSource, address: int) -> None:
        """Put a matrix at an address of the device, its scales by group with it."""
        layout = source.layout
        structure = _MatrixStructure(
            self._scratch.address,
            address,
            layout.run_bytes,
            KINDS[layout.kind],
            layout.rows,
            layout.columns,
            layout.padded_rows,
            layout.tile_runs,
            source.by_rows,
            layout.interleaved,
            layout.granularity,
            layout.group_size or 0,
            BITS[layout.scale] // 8,
        )
        self._copy(source.values, layout.rows * layout.columns * BITS[layout.kind] // 8)
        self._launch(self._values, structure, layout.tile_runs * (16 if layout.integer else 32))
        if layout.granularity and source.scales is not None:
            self._copy(source.scales, math.prod(source.scales.shape) * BITS[layout.scale] // 8)
            self._launch(self._scales, structure, layout.tile_runs * layout.scales_in_run)

    def _launch(self, function: kernels.Function, structure: _MatrixStructure, columns: int) -> None:
        blocks = (-(-structure.padded_rows // 32), max(1, min(-(-columns // 64), 65535)))
        function.launch(self._stream, blocks, (32, 8), kernels.Arguments(structure))

    def _copy(self, stored: StoredInitializer, size: int) -> None:
        """A tensor from its file into the scratch buffer, which earlier work on the stream has finished with."""
        path = self._folder / stored.location
        with path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for start in range(0, size, len(self._staging[0])):
                staging, event = self._staging[self._turn], self._copied[self._turn]
                event.synchronize()
                piece = staging[: min(len(staging), size - start)]
                _fill(file, piece, path, stored.name)
                self._stream.copy_to_device(self._scratch, piece, start)
                self._stream.record(event)
                self._turn ^= 1
        self.bytes += size


def _fill(file: object, piece: NDArray[np.uint8], path: Path, name: str) -> None:
    view, done = memoryview(piece.data), 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path}: too short for {name}; the bundle is damaged: copy or export it again")
        done += count


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
        files, config, sources = _Files(self._folder), self.config, self.sources
        size = self.layer_vectors.size
        all_vectors = np.zeros(size * config.num_layers + self.model_vectors.size, np.float32)
        for index in range(config.num_layers):
            prefix, at = f"layers.{index}.", all_vectors[index * size : (index + 1) * size]
            for name, offset in self.layer_vectors.offsets.items():
                product, _, what = name.partition(".")
                if product in NAMES and what == "scales":
                    source = sources.layers[index][product]
                    assert source.scales is not None
                    value = _by_device_row(source.layout, files.floats(source.scales).reshape(-1))
                elif product in NAMES and what == "bias":
                    stored = next(
                        sources.vectors[f"{prefix}{each}.bias"]
                        for each in NAMES[product]
                        if f"{prefix}{each}.bias" in sources.vectors
                    )
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
