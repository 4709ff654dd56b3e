"""Files of tensors: safetensors, and what torch.save wrote; whole or in shards; read one tensor at a time.

Rule: opening a source reads names and shapes only, and reading a tensor brings in that tensor and nothing else. No code in
a file is ever run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import torch

Array = NDArray[np.generic]


class TensorSource(Protocol):
    """Tensors by their name in the files."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files they are in."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def tensor(self, name: str, rows: slice | None = None) -> Array:
        """Read one tensor, or only some of its rows."""


def described(source: TensorSource) -> str:
    """Where a source is, for messages: its file, or the folder of its shards."""
    return str(source.files[0] if len(source.files) == 1 else source.files[0].parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(document).__name__}")
    return document


def shards(index: Path) -> tuple[Path, ...]:
    """The files that an index (`….index.json`) spreads a checkpoint over.

    Raises:
        UserError: it is no index, or a shard is not there.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise UserError(f"{index}: no usable 'weight_map' (tensor name to file name)")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    if missing := [file.name for file in files if not os.path.lexists(file)]:
        raise UserError(f"{index}: names {', '.join(missing)}, which is missing; copy the whole checkpoint")
    return files


# ---------------------------------------------------------------- safetensors


FLOATS = ("F64", "F32", "F16", "BF16")
"""Formats of floating-point tensors, by their safetensors name."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is."""

    file: Path
    shape: tuple[int, ...]


class SafetensorsSource:
    """Tensors in safetensors files.

    A file is opened again for each tensor: while it is open it is mapped, and what was read of it would count as memory in use.

    Args:
        files: one file, or all shards.

    Raises:
        UserError: a file is truncated or not safetensors, or holds a type of number that no RetNet is stored in.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._entries = {name: entry for file in self.files for name, entry in _entries(file).items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def tensor(self, name: str, rows: slice | None = None) -> Array:
        with _opened(self._entries[name].file) as file:
            array: Array = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        return array


def _entries(file: Path) -> dict[str, _Entry]:
    entries = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
            tensor = opened.get_slice(name)
            if tensor.get_dtype() not in FLOATS:
                raise UserError(
                    f"{file}: {name} is {tensor.get_dtype()}, expected one of {', '.join(FLOATS)}; save it as one of them"
                )
            entries[name] = _Entry(file, tuple(tensor.get_shape()))
    return entries


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import ml_dtypes  # noqa: F401 (gives NumPy the bfloat16 that safetensors asks for)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(
            f"{file}: not a complete safetensors file ({error}); it may be truncated, copy or download it again"
        ) from error


# ---------------------------------------------------------------- torch


class TorchSource:
    """Tensors that torch loaded, mapped from the disk where the file's format allows it.

    Args:
        files: where they came from.
        tensors: by name.
    """

    def __init__(self, files: Sequence[Path], tensors: Mapping[str, torch.Tensor]) -> None:
        self.files, self._tensors = tuple(files), dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str, rows: slice | None = None) -> Array:
        import torch

        stored = self._tensors[name].detach()
        stored = stored if rows is None else stored[rows]
        if stored.dtype == torch.bfloat16:  # NumPy knows no bfloat16 of its own
            import ml_dtypes

            bits: Array = stored.view(torch.uint16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: Array = stored.numpy()
        return array


def load_torch(file: Path) -> Any:
    """What torch.save wrote, with tensors mapped rather than read, and without running code from the file.

    Of classes, those are allowed that hold values and do nothing: `argparse.Namespace`, in which fairseq keeps its settings, and
    NumPy's arrays, scalars and types, which it keeps beside the model.

    Raises:
        UserError: it is truncated, not such a file, or needs another class.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", f"reading {file.name}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_globals()]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # truncation and refusals come as RuntimeError, EOFError, UnpicklingError, OSError and more
        raise UserError(
            f"{file}: torch cannot load it as plain tensors ({_reason(str(error))}); if it is complete, save only its state_dict "
            "and settings with the package that wrote it"
        ) from error


def _numpy_globals() -> list[Any]:
    """What a pickle needs to make NumPy's arrays and scalars again, under the names that NumPy 1 and NumPy 2 write."""
    multiarray = np.array(0).__reduce__()[0].__module__  # numpy._core.multiarray, or numpy.core.multiarray before 2.0
    module: Any = importlib.import_module(multiarray)
    makers = [
        (getattr(module, name), f"numpy{core}.multiarray.{name}")
        for core in (".core", "._core")
        for name in ("scalar", "_reconstruct")
    ]
    types = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [*makers, np.ndarray, np.dtype, *types]


def _reason(message: str) -> str:
    """The part of torch's long message that names what it refused."""
    for line in message.splitlines():
        if "Unsupported global" in line or "GLOBAL" in line:
            return line.strip().removeprefix("WeightsUnpickler error: ").split(" was not an allowed")[0]
    return message.split("\n")[0].split(". ")[0][:160]
