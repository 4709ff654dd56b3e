"""SHA-256 during other work: data that is read or written anyway is hashed on a separate thread.

Hashing a gigabyte takes about a second, and reading a file a second time only for its hash takes as long as reading it. Both
`hashlib` and file writes release Python's lock, so the hash costs almost nothing where a second core is free.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


class Hashing:
    """Hashes in order; handing over the next piece waits for the last, so that at most one is held."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sha256")
        self._running: Future[None] | None = None

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    def add(self, digest: hashlib._Hash, content: memoryview) -> None:
        """Update `digest` with the content, which must not change until `wait` returns."""
        self.wait()
        self._running = self._pool.submit(digest.update, content)

    def wait(self) -> None:
        """Return when all that was added is in its digest."""
        if self._running is not None:
            self._running.result()
            self._running = None


def bytes_of(array: NDArray[np.generic]) -> memoryview:
    """The bytes of an array in C order, without a copy if it is contiguous (whatever its dtype: bfloat16 has no buffer)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
