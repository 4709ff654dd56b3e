"""Sequences in a folder: a state file beside the tokens that led to it, each checked against the other when it is read.

Rule: a name is letters, digits and `-_.` and never leads out of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.files import write_atomically
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.state import Snapshot

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Store:
    """Saved sequences of one model.

    Args:
        folder: where they lie; made if it is not there.
        manifest: of the model.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._manifest = folder, manifest
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: no folder for states: {error.strerror}") from error

    def names(self) -> list[str]:
        """All that are saved, the last saved first."""
        found = [path for path in self.folder.glob("*.state") if NAME.fullmatch(path.stem)]
        return [path.stem for path in sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.stem))]

    def bytes_of(self, name: str) -> int:
        """Size of a state on the disk."""
        return self._path(name, "state").stat().st_size

    def save(self, name: str, tokens: Sequence[int] | NDArray[np.int64], snapshot: Snapshot) -> None:
        """Save a sequence.

        Raises:
            UserError: the name is none, or the file cannot be written.
        """
        content = io.BytesIO()
        np.save(content, np.asarray(tokens, np.int64))
        try:
            write_atomically(self._path(name, "tokens"), content.getbuffer())
        except OSError as error:
            raise UserError(f"{name}: the state cannot be saved: {error.strerror}") from error
        snapshot.save(self._path(name, "state"))

    def load(self, name: str) -> tuple[list[int], Snapshot]:
        """Read a sequence.

        Raises:
            UserError: there is none of that name, it is damaged, or of another model.
        """
        state, path = self._path(name, "state"), self._path(name, "tokens")
        if not state.is_file() or not path.is_file():
            raise UserError(f"no saved state {name!r}; saved states: {', '.join(self.names()) or 'none'}")
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path.name}: not the tokens of a saved state ({error}); save it again") from error
        snapshot = Snapshot.load(state)
        snapshot.check(self._manifest)
        if (
            tokens.dtype != np.int64
            or tokens.ndim != 1
            or len(tokens) != snapshot.position
            or not np.array_equal(np.bincount(tokens.clip(0), minlength=len(snapshot.read)), snapshot.read)
            or tuple(tokens[len(tokens) - len(snapshot.tail) :].tolist()) != snapshot.tail
        ):
            raise UserError(f"{path.name}: these tokens do not belong to the state of the same name; save it again")
        return tokens.tolist(), snapshot

    def delete(self, name: str) -> None:
        """Delete a sequence.

        Raises:
            UserError: there is none of that name.
        """
        if not self._path(name, "state").is_file():
            raise UserError(f"no saved state {name!r}; saved states: {', '.join(self.names()) or 'none'}")
        for kind in ("state", "tokens"):
            with contextlib.suppress(FileNotFoundError):
                self._path(name, kind).unlink()

    def touch(self, name: str) -> None:
        """Make it the last saved."""
        self._path(name, "state").touch()

    def check_name(self, name: str) -> None:
        """Refuse an invalid name.

        Raises:
            UserError: it is none.
        """
        self._path(name, "state")

    def _path(self, name: str, kind: str) -> Path:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is not a name for a state: expected letters, digits, '-', '_' and '.', at most 100")
        return self.folder / f"{name}.{kind}"


def name_of(tokens: Sequence[int] | NDArray[np.int64]) -> str:
    """A name for a sequence that has none: a hash of its tokens."""
    return hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).hexdigest()[:40]
