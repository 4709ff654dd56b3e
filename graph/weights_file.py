"""`weights.bin`: the external data of every graph of a bundle, each tensor written once, as it is met.

Rule: one tensor in memory at a time. A graph asks for a weight by name; the first request reads it, converts it and
appends it to the file; a second graph that asks for the same name gets a reference to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

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
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.ExternalTensor:
        """A reference to the tensor `name`; `make` is called only if the file does not hold it yet."""
        if name not in self._tensors:
            self._tensors[name] = self._append(name, np.ascontiguousarray(make()))
        return self._tensors[name]

    def _append(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor:
        offset = self._file.tell()
        if array.nbytes >= ALIGNMENT and offset % ALIGNMENT:
            self._file.write(bytes(ALIGNMENT - offset % ALIGNMENT))
            offset = self._file.tell()
        array.tofile(self._file)
        return ir.ExternalTensor(
            location=self._path.name,
            offset=offset,
            length=array.nbytes,
            dtype=ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=str(self._path.parent),
        )
