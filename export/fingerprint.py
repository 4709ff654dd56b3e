"""Which checkpoint a bundle came from: a hash of its weights, made while they are read for the export."""

from __future__ import annotations

import hashlib
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from retnet_export.graph.weights import ReadWeight
from retnet_export.runtime.hashing import Hashing, bytes_of


class Fingerprint:
    """Reads weights and hashes each as it passes.

    The result covers every weight's name, dtype, shape and bytes, in the order of the names: it does not depend on the order
    of reading, nor on how the checkpoint is cut into files.

    Args:
        read: reads a canonical weight.
    """

    def __init__(self, read: ReadWeight) -> None:
        self._read = read
        self._digests: dict[str, hashlib._Hash] = {}
        self._hashing = Hashing()

    def __enter__(self) -> Fingerprint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hashing.__exit__(kind, error, trace)

    def read(self, name: str) -> NDArray[np.generic]:
        """Read one canonical weight."""
        array = self._read(name)
        self._digests[name] = hashlib.sha256(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        self._hashing.add(self._digests[name], bytes_of(array))
        return array

    def sha256(self) -> str:
        """The hash over all weights read so far, in hexadecimal."""
        self._hashing.wait()
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(self._digests[name].digest())
        return whole.hexdigest()
