"""`weights.bin`: the external data of every graph of a bundle, each tensor written once, as it is met.

Rule: one tensor in memory at a time. A graph asks for a weight by name; the first request reads it, converts it and
appends it to the file; a second graph that asks for the same name gets a reference to the same bytes. The file is hashed
while it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.runtime.bundle.hashing import Hashing, bytes_of
from retnet_export.runtime.bundle.manifest import FileRecord

ALIGNMENT = 4096
"""Offsets of tensors of at least this size are its multiples, so that a runtime can map them (ONNX external data rules)."""


class WeightsFile:
    """Appends tensors to a file and hands out ONNX references to them.

    Args:
        path: the file to create, in the folder of the graphs that will refer to it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, (path.parent, path.name)
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

    def take_over(self, model: ir.Model) -> None:
        """Bring the external tensors of a graph that lie in other files into this one."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (Path(tensor.base_dir), tensor.location) != self._place:
                value.const_value = self.tensor(name, tensor.numpy)

    def view(self, name: str, of: ir.ExternalTensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        """The bytes of a tensor of this file under another name, element type and shape."""
        assert of.offset is not None
        assert of.length is not None
        return self._reference(name, of.offset, of.length, dtype, shape)

    def _append(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor:
        stored = pack_int4(array) if array.dtype == ml_dtypes.int4 else array
        if stored.nbytes >= ALIGNMENT and self._size % ALIGNMENT:
            self._write(memoryview(bytes(ALIGNMENT - self._size % ALIGNMENT)))
        offset = self._size
        self._write(bytes_of(stored))
        return self._reference(name, offset, stored.nbytes, ir.DataType.from_numpy(array.dtype), array.shape)

    def _reference(self, name: str, offset: int, length: int, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location=self._path.name,
            offset=offset,
            length=length,
            dtype=dtype,
            shape=ir.Shape(shape),
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


def pack_int4(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Four-bit integers as ONNX stores them: two a byte, the first in the low half; an odd last one beside a zero."""
    halves = array.astype(np.int8).reshape(-1).view(np.uint8) & 0xF
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    return np.asarray(halves[0::2] | (halves[1::2] << 4), np.uint8)
