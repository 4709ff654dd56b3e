"""What every reader gives: a configuration, and weights by canonical name, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.config import ModelConfig
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.files import sha256_of

Array = NDArray[np.generic]


class TensorSource(Protocol):
    """Tensors by their name in the file."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files they are in."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> Array:
        """Read one tensor."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained RetNet on disk.

    Attributes:
        path: where it was opened.
        family: "fla", …
        config: its architecture.
        read: reads one canonical weight (graph/weights.py), in the checkpoint's own precision.
        files: the weight files, whose hashes identify it.
        tokenizer: tokenizer.json, if there is one.
        bos_id, eos_ids: tokens that begin and end a text.
    """

    path: Path
    family: str
    config: ModelConfig
    read: Callable[[str], Array]
    files: tuple[Path, ...]
    tokenizer: Path | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def fingerprint(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 over the hashes of its weight files, by name."""
        digest = hashlib.sha256()
        for file in sorted(self.files):
            digest.update(f"{file.name} {sha256_of(file, progress)}\n".encode())
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it cannot be read, is not JSON, or not an object.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(document).__name__}")
    return document


class Fields:
    """Typed look-ups in a config.json, whose faults name the file and the field."""

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self._path, self._document = path, document

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int:
            raise self._fault(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise self._fault(name, "a number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._fault(name, "true or false", value)
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._fault(name, " or ".join(map(repr, choices)), value)
        return choices[value]

    def _get(self, name: str, default: object) -> Any:
        value = self._document.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self._path}: the field {name!r} is missing")
        return value

    def _fault(self, name: str, expected: str, value: object) -> UserError:
        return UserError(f"{self._path}: {name} is {value!r}, expected {expected}")


def token_ids(document: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos of a config.json: eos may be one id or several."""
    bos, eos = document.get("bos_token_id"), document.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [eos]
    return bos if type(bos) is int else None, tuple(token for token in eos_ids if type(token) is int)


def check_weights(config: ModelConfig, source: TensorSource, names: Mapping[str, str], ignored: Sequence[str] = ()) -> None:
    """Compare what the configuration asks for with what the files hold, before anything is written.

    Args:
        config: the architecture.
        source: the files.
        names: the file's name of every canonical weight.
        ignored: names in the file that need not be read (saved buffers).

    Raises:
        UserError: tensors are missing, unused, or of another shape; all are listed.
    """
    where = source.files[0] if len(source.files) == 1 else source.files[0].parent
    held = set(source.names)
    shapes = weight_shapes(config)
    missing = [names[name] for name in shapes if names[name] not in held]
    unused = sorted(held - {names[name] for name in shapes} - set(ignored))
    problems = [f"missing: {_shown(missing)}"] * bool(missing) + [f"not used: {_shown(unused)}"] * bool(unused)
    if problems:
        raise UserError(f"{where}: its tensors are not those that config.json describes; {'; '.join(problems)}")
    wrong = [
        f"{names[name]} is {list(source.shape(names[name]))}, expected {list(shape)}"
        for name, shape in shapes.items()
        if source.shape(names[name]) != shape
    ]
    if wrong:
        raise UserError(f"{where}: shapes do not match config.json: {_shown(wrong)}")


def _shown(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
