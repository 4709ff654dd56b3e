"""`weights.bin`: the external data of every graph of a bundle, each tensor written once, as it is met.

Rule: one tensor in memory at a time. A graph asks for a weight by name; the first request reads it, converts it and
appends it to the file; a second graph that asks for the same name gets a reference to the same bytes. The file is hashed
while it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.runtime.hashing import Hashing, bytes_of
from retnet_export.runtime.manifest import FileRecord

ALIGNMENT = 4096
"""Offsets of tensors of at least this size are its multiples, so that a runtime can map them (ONNX external data rules)."""


class WeightsFile:
    """Appends tensors to a file and hands out ONNX references to them.

    Args:
        path: the file to create, in the folder of the graphs that will refer to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb", buffering=0)
        self._size = 0
        self._tensors: dict[str, ir.ExternalTensor] = {}
        self._digest = hashlib.sha256()
        self._hashing = Hashing()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hashing.__exit__(kind, error, trace)
        self._file.close()

    @property
    def name(self) -> str:
        """The file's name in its folder."""
        return self._path.name

    def record(self) -> FileRecord:
        """Size and hash of what has been written."""
        self._hashing.wait()
        return FileRecord(self._size, self._digest.hexdigest())

    def tensor(self, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.ExternalTensor:
        """A reference to the tensor `name`; `make` is called only if the file does not hold it yet."""
        if name not in self._tensors:
            self._tensors[name] = self._append(name, np.ascontiguousarray(make()))
        return self._tensors[name]

    def _append(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor:
        if array.nbytes >= ALIGNMENT and self._size % ALIGNMENT:
            self._write(memoryview(bytes(ALIGNMENT - self._size % ALIGNMENT)))
        offset = self._size
        self._write(bytes_of(array))
        return ir.ExternalTensor(
            location=self._path.name,
            offset=offset,
            length=array.nbytes,
            dtype=ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=str(self._path.parent),
        )

    def _write(self, content: memoryview) -> None:
        # Not array.tofile: it does not say which fault a failed write was (a full disk, most likely).
        self._hashing.add(self._digest, content)
        left = content
        while left:
            left = left[self._file.write(left) :]
        self._size += len(content)
