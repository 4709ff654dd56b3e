"""From a bundle's files to the device, a matrix at a time: read through pinned memory, and put in its place by a kernel.

Rule: the device holds one matrix more than the weights while loading; the host holds two pieces of a file.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.compiler import compile_kernels
from retnet_export.runtime.backends.cuda.layout import BITS
from retnet_export.runtime.backends.cuda.plan import KINDS
from retnet_export.runtime.backends.cuda.sources import MatrixSource
from retnet_export.runtime.bundle.external_data import StoredInitializer
from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError

STAGING_BYTES = 32 << 20


class Files:
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
