"""Tensors in safetensors files, one file or shards with an index, read lazily: a tensor at a time, mapped from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.export.checkpoints.base import read_json
from retnet_export.runtime.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsSource:
    """The tensors of a checkpoint folder.

    Args:
        folder: it holds model.safetensors, or model.safetensors.index.json and the shards it names.

    Raises:
        UserError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _files(folder)
        self._file_of: dict[str, Path] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        shapes = {}
        for file in self.files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    self._file_of[name] = file
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        self._shapes = shapes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> NDArray[np.generic]:
        with _open(self._file_of[name]) as tensors:
            array: NDArray[np.generic] = tensors.get_tensor(name)
            return array


def _files(folder: Path) -> tuple[Path, ...]:
    if (folder / SINGLE).exists():
        return (folder / SINGLE,)
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no weights; expected {SINGLE}, or {INDEX} with its shards")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) and "/" not in name for name in index.values()):
        raise UserError(f"{folder / INDEX}: no usable 'weight_map' (tensor name to file name)")
    files = tuple(folder / name for name in sorted(set(index.values())))
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{folder}: {INDEX} names {', '.join(missing)}, which is not there; copy the whole checkpoint")
    return files


def _open(file: Path):  # type: ignore[no-untyped-def]  # safetensors has no stubs for its context manager
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}); it may be truncated, copy or download it again"
        ) from error
