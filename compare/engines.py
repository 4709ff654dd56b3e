"""What is measured: the bundle on its backend, and the baseline on ONNX Runtime, behind one small protocol.

Rule: an engine can be put at any context without reading its way there. Speed does not depend on what a state or a cache
holds, so both are filled with random numbers and told how many tokens they stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.compare.baseline import Baseline
from retnet_export.runtime.backends import open_backend
from retnet_export.runtime.backends.base import NUMPY_DTYPES
from retnet_export.runtime.backends.onnxruntime_api import ACTIVATION_ENTRY, return_free_memory
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError


class Runnable(Protocol):
    """A model made ready to run."""

    def open(self, batch: int, context: int, tokens: int) -> None:
        """Allocate for `batch` sequences that have read `context` tokens and will read `tokens` more."""

    def step(self) -> None:
        """Read one token per sequence, to logits on the host."""

    def prefill(self, tokens: int) -> None:
        """Read a prompt of `tokens` tokens per sequence from the start, to logits on the host."""


class RetNetEngine:
    """The bundle, through the runtime that users run it with.

    Args:
        path: the bundle.
        backend: as on the command line.
        threads: CPU threads.
    """

    def __init__(self, path: Path, backend: str, threads: int) -> None:
        self._bundle = open_bundle(path, check_hashes=False)
        self._backend = open_backend(backend, self._bundle, threads)

    def open(self, batch: int, context: int, tokens: int) -> None:
        del tokens  # the state has no room to reserve
        manifest = self._bundle.manifest
        generator = np.random.default_rng(0)
        state = {
            spec.input: np.full((1,), context, np.int64)
            if spec.layer is None
            else generator.standard_normal((1, *spec.shape[1:]), np.float32).astype(NUMPY_DTYPES[spec.dtype])
            for spec in manifest.state
        }
        self._runner = self._backend.open_runner(batch)
        for slot in range(batch):
            self._runner.write_state(slot, state)
        self._tokens = generator.integers(0, manifest.model.vocab_size, batch)

    def step(self) -> None:
        self._runner.step(self._tokens)
        self._runner.logits()

    def prefill(self, tokens: int) -> None:
        chunk_size = self._bundle.manifest.graphs["prefill"].chunk_size
        for start in range(0, tokens, chunk_size):
            size = min(chunk_size, tokens - start)
            chunk = np.repeat(self._tokens[:, None], size, 1)
            self._runner.prefill(chunk, np.full(len(chunk), size, np.int64))
        self._runner.logits()


class TransformerEngine:
    """The baseline, its cache one buffer per layer that the graph extends in place.

    Args:
        baseline: its files.
        threads: CPU threads.

    Raises:
        UserError: this ONNX Runtime refuses the graph.
    """

    PREFILL_CHUNK = 256
    """Tokens read at once by a single sequence: the fastest of 128 to 2,048 where it was measured (docs/lab/comparison.md)."""

    def __init__(self, baseline: Baseline, threads: int) -> None:
        import onnxruntime

        self._baseline = baseline
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # As the backend of the RetNet does it.
        options.add_session_config_entry(*ACTIVATION_ENTRY)
        try:
            self._session = onnxruntime.InferenceSession(str(baseline.graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no narrower base class
            raise UserError(f"ONNX Runtime {onnxruntime.__version__} cannot run the baseline's attention: {error}") from error
        return_free_memory()

    def open(self, batch: int, context: int, tokens: int) -> None:
        config, capacity = self._baseline.config, context + tokens
        self._batch, self._length = batch, context
        self._lasts, self._total = np.zeros(batch, np.int32), np.zeros((), np.int32)
        self.logits = np.zeros((batch, 1, config.vocab_size), np.float32)
        self._cache = {
            f"{index}.{part}": self._filled((batch, config.num_kv_heads, capacity, config.head_dim))
            for index in range(config.num_layers)
            for part in ("key", "value")
        }
        self._binding = self._session.io_binding()
        self._bind_input("seqlens_k", self._lasts)
        self._bind_input("total_sequence_length", self._total)
        for name, array in self._cache.items():
            self._bind_input(f"past_key_values.{name}", array)
            self._bind_output(f"present.{name}", array)
        self._bind_output("logits", self.logits)
        self._ids = np.zeros((batch, 1), np.int64)
        self._bind_input("input_ids", self._ids)

    def step(self) -> None:
        self.read(self._ids)

    def prefill(self, tokens: int) -> None:
        # ONNX Runtime reads a prompt in several pieces only for a single sequence.
        piece = self.PREFILL_CHUNK if self._batch == 1 else tokens
        self._length = 0
        for start in range(0, tokens, piece):
            self.read(np.zeros((self._batch, min(piece, tokens - start)), np.int64))

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens (B, T) after those read before; logits (B, 1, V) after the last, valid until the next call."""
        if ids is not self._ids:
            self._ids = np.ascontiguousarray(ids)
            self._bind_input("input_ids", self._ids)
        self._length += ids.shape[1]
        self._lasts[:], self._total[...] = self._length - 1, self._length
        self._session.run_with_iobinding(self._binding)
        return self.logits

    def _filled(self, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """A cache of random contents; a real allocation, every page touched."""
        cache = np.empty(shape, self._baseline.cache_dtype)
        row = np.random.default_rng(0).standard_normal(shape[-1])
        cache[:] = (row / self._baseline.cache_scale).clip(-127, 127).astype(cache.dtype)
        return cache

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
