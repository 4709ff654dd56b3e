"""A saved sequence: its state, position and last logits, in memory or in a file, independent of the backend.

The state of a RetNet has one size however much was read, so a snapshot of a book is as small as one of a word. A file is a
safetensors file with the state tensors under their names in the graph, and in its metadata which model they belong to and a
checksum, which safetensors itself lacks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import NUMPY_DTYPES, State
from retnet_export.runtime.bundle.files import write_atomically
from retnet_export.runtime.bundle.manifest import Manifest, StateSpec
from retnet_export.runtime.bundle.schema import encode
from retnet_export.runtime.errors import UserError

FORMAT = "retnet-export state"
FORMAT_VERSION = "2"
"""2: states are named `state.007`, and lie (H, Dk, Dv) whatever backend they were taken from."""


def model_hash(manifest: Manifest) -> str:
    """What a state belongs to: SHA-256 over the architecture and the weights file; the same on every backend."""
    weights = manifest.files.get("weights.bin")
    identity = {"model": encode(manifest.model), "weights": None if weights is None else encode(weights)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def first_broken_layer(specs: Sequence[StateSpec], state: State) -> str:
    """Where values that are not finite arose, as a clause: each layer passes them to the state of the next, not back."""
    broken = next((spec for spec in specs if not np.isfinite(state[spec.input]).all()), None)
    if broken is None:
        return "every layer's state is finite, so the cause is after the last layer or in the output head"
    return f"the first state that is not finite is {broken.input!r}, of layer {broken.layer}"


@dataclass(frozen=True)
class Snapshot:
    """One sequence at one moment.

    Attributes:
        model: `model_hash` of the bundle it was taken from.
        state: an array for each `StateSpec` of the bundle, by input name, each (1, …).
        logits: float32 (V,), after the last token read; None if nothing was read yet.
        read: int32 (V,), how often each token was read; repetition penalties need it.
        tail: the last tokens read, which the next piece of text joins on to.
        history: int32 (n,), more of the last tokens, which drafts are looked up in (speculation.py); of bounded length.
        chat: what a conversation remembers beside the state, as JSON; empty if it is none.
        unread: spaces at the end of the text, for a tokenizer that reads them only together with what follows.
        source: the file it was loaded from, or "a snapshot", for messages.
    """

    model: str
    state: State
    logits: NDArray[np.float32] | None
    read: NDArray[np.int32]
    tail: tuple[int, ...] = ()
    history: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    unread: str = ""
    chat: str = ""
    source: str = "the snapshot"

    def __repr__(self) -> str:
        return f"<Snapshot at token {self.position} of model {self.model[:12]}…, {self.bytes / 1e6:.1f} MB>"

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return int(self.state["position"][0])

    @property
    def bytes(self) -> int:
        """Size of the state alone."""
        return sum(array.nbytes for array in self.state.values())

    def check(self, manifest: Manifest) -> None:
        """Compare with the model it is about to be restored into.

        Raises:
            UserError: it belongs to another model, or a tensor is missing or of another shape or type.
        """
        if self.model != model_hash(manifest):
            raise UserError(
                f"{self.source}: a state of another model: it belongs to {self.model[:12]}…, the model {manifest.name!r} is "
                f"{model_hash(manifest)[:12]}…; architecture and weights must be the same. Read the prompt again with this model"
            )
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            spec.input: (spec.dtype, (1, *spec.shape[1:])) for spec in manifest.state
        }
        if differing := sorted(set(expected) ^ set(self.state)):
            fault = "lacks the" if differing[0] in expected else "has an unknown"
            raise UserError(f"{self.source}: it {fault} state tensor {differing[0]!r}; expected {', '.join(expected)}")
        for name, (dtype, shape) in expected.items():
            found = self.state[name]
            if found.dtype != NUMPY_DTYPES[dtype] or found.shape != shape:
                raise UserError(
                    f"{self.source}: {name} is {found.dtype}{list(found.shape)}, this bundle's state is {dtype}{list(shape)}; "
                    "use a bundle with the same format of the state"
                )
        vocabulary = (manifest.model.vocab_size,)
        if self.read.shape != vocabulary or (self.logits is not None and self.logits.shape != vocabulary):
            raise UserError(f"{self.source}: it is for a vocabulary of {len(self.read)}, the model's is {vocabulary[0]}")
        if (self.logits is None) != (self.position == 0) or self.position < 0:
            raise UserError(f"{self.source}: position {self.position} {'without' if self.logits is None else 'with'} logits")

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all: if the disk is full, an existing file stays as it was.

        Raises:
            UserError: the file cannot be written.
        """
        from safetensors.numpy import save

        tensors = self._tensors()
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_sha256": self.model,
            "position": str(self.position),
            "unread": json.dumps(self.unread),
            "chat": self.chat,
            "state_dtype": ", ".join(sorted({str(array.dtype) for name, array in self.state.items() if name != "position"})),
        }
        metadata["sha256"] = _checksum(metadata, tensors)
        try:
            write_atomically(Path(path), save(tensors, metadata))
        except OSError as error:
            raise UserError(f"{path}: the state cannot be saved: {error.strerror}; an existing file is unchanged") from error

    @staticmethod
    def load(path: str | Path) -> Snapshot:
        """Read a file that `save` wrote.

        Raises:
            UserError: it cannot be read, is something else, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path}: not a saved state but another safetensors file; `generate --save-state` makes one")
                if metadata.get("format_version") != FORMAT_VERSION:
                    raise UserError(
                        f"{path}: state format {metadata.get('format_version')}, this version of retnet-export reads "
                        f"{FORMAT_VERSION}; save it again with this version"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except OSError as error:
            # safetensors puts the path behind its message
            reason = error.strerror or str(error).removesuffix(f": {path}")
            raise UserError(f"{path}: the state cannot be read: {reason}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a saved state, or a damaged one ({error}); save it again") from error
        if metadata.pop("sha256", None) != _checksum(metadata, tensors):
            raise UserError(f"{path}: the saved state is damaged: its content does not match its checksum")
        snapshot = _snapshot_from_tensors(metadata.get("model_sha256", ""), tensors, str(path))
        return replace(snapshot, unread=str(json.loads(metadata.get("unread", '""'))), chat=metadata.get("chat", ""))

    def _tensors(self) -> dict[str, NDArray[np.generic]]:
        extra = {"session.read": self.read, "session.tail": np.array(self.tail, np.int64)}
        if len(self.history):
            extra["session.history"] = self.history
        if self.logits is not None:
            extra["session.logits"] = self.logits
        return {name: np.ascontiguousarray(array) for name, array in {**self.state, **extra}.items()}


def _snapshot_from_tensors(model: str, tensors: Mapping[str, NDArray[np.generic]], source: str) -> Snapshot:
    def part(name: str, dtype: type[np.generic], axes: int) -> NDArray[np.generic]:
        array = tensors.get(name)
        if array is None or array.dtype != dtype or array.ndim != axes:
            raise UserError(f"{source}: not a saved state: it has no {name!r} of type {np.dtype(dtype)} and {axes} axis")
        return array

    part("position", np.int64, 1)
    logits = part("session.logits", np.float32, 1) if "session.logits" in tensors else None
    return Snapshot(
        model=model,
        state={name: array for name, array in tensors.items() if not name.startswith("session.")},
        logits=None if logits is None else logits.astype(np.float32, copy=False),
        read=part("session.read", np.int32, 1).astype(np.int32, copy=False),
        tail=tuple(int(token) for token in part("session.tail", np.int64, 1)),
        history=part("session.history", np.int32, 1).astype(np.int32, copy=False)
        if "session.history" in tensors
        else np.zeros(0, np.int32),
        source=source,
    )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()
