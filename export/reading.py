"""Reading a checkpoint for an export: a few weights ahead of the writer, on a thread, and hashed as they come.

The disk is the slowest part of an export. While the main thread converts and writes one weight, the next ones are read, so
that reading and writing overlap as they do in a plain copy.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from retnet_export.graph.weights import ReadWeight, weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.hashing import bytes_of
from retnet_export.runtime.progress import Progress

ELEMENTS_AHEAD = 1 << 26
"""Weights are read ahead until so many numbers wait: 128 MiB in half precision. One weight may exceed it."""


class WeightsAhead:
    """Reads the weights of a checkpoint, whose order of use is that of `weight_shapes`; another order works, but slower.

    Args:
        progress: receives the share of the weights that were taken.
    """

    def __init__(self, config: ModelConfig, read: ReadWeight, progress: Progress) -> None:
        self._read, self._progress, self._taken = read, progress, 0
        self._shapes = weight_shapes(config)
        self._order = {name: position for position, name in enumerate(self._shapes)}
        self._names = list(self._shapes)
        self._digests: dict[str, bytes] = {}
        self._waiting: dict[str, Future[NDArray[np.generic]]] = {}
        self._scheduled = 0  # every name before this place in the order has been asked for or scheduled
        self._pool = ThreadPoolExecutor(1, "read-weights")

    def __enter__(self) -> WeightsAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, name: str) -> NDArray[np.generic]:
        """One canonical weight."""
        self._taken += 1
        self._progress("writing weights", self._taken / len(self._names))
        future = self._waiting.pop(name, None) or self._pool.submit(self._read_and_hash, name)
        self._scheduled = max(self._scheduled, self._order[name] + 1)
        self._read_ahead()
        return future.result()

    def sha256(self) -> str:
        """A hash over name, dtype, shape and bytes of every weight read, whatever their order and the checkpoint's files."""
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(self._digests[name])
        return whole.hexdigest()

    def _read_ahead(self) -> None:
        waiting = sum(math.prod(self._shapes[name]) for name in self._waiting)
        while self._scheduled < len(self._names) and waiting < ELEMENTS_AHEAD:
            name = self._names[self._scheduled]
            self._waiting[name] = self._pool.submit(self._read_and_hash, name)
            waiting += math.prod(self._shapes[name])
            self._scheduled += 1

    def _read_and_hash(self, name: str) -> NDArray[np.generic]:
        array = self._read(name)
        digest = hashlib.sha256(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(bytes_of(array))
        self._digests[name] = digest.digest()
        return array
