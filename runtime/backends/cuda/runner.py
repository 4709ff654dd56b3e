"""A batch of sequences on the backend `cuda`: its states, positions and logits, and who runs what is asked of it.

Rule: one sequence steps with the kernel of one launch (step.cu); everything else goes through `Many`. Both work on the same state,
so whoever changes it first brings it up to date.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import NUMPY_DTYPES, State, top_of
from retnet_export.runtime.backends.cuda.buffers import ManyBatch
from retnet_export.runtime.backends.cuda.plan import THREADS, TOP
from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.backends.cuda.backend import CudaBackend

RESULT_WORDS = 1 + 2 * TOP
"""`Result` of step.cu, in words of 32 bits: whether more logits are equal than it looks at, tokens, logits."""


class StepStructure(ctypes.Structure):
    """`Params` of step.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                "layers", "head", "embedding", "embedding_scales", "vectors", "phases", "state", "position",
                "mail", "control", "logits", "tile_largest", "result",
            )
        ),
        ("token", ctypes.c_int),
    )  # fmt: skip


class CudaRunner:
    """State, position and logits of a batch of sequences."""

    def __init__(self, backend: CudaBackend, batch: int) -> None:
        self._backend, self.batch, self._stream, self._slots = backend, batch, backend.stream, batch
        config = backend.manifest.model
        self._config, self._layer_bytes = config, 4 * config.state_elements // config.num_layers
        self._state = cuda.DeviceBuffer(batch * 4 * config.state_elements)
        self._positions = cuda.DeviceBuffer(8 * batch)
        self._logits = cuda.DeviceBuffer(4 * batch * config.vocab_size)
        self._result, result = kernels.mapped((RESULT_WORDS,), np.uint32)
        self._host_logits: NDArray[np.float32] | None = None
        self._logits_current, self._waiting, self._alone = False, False, True
        structure = backend.structure()
        structure.state, structure.position = self._state.address, self._positions.address
        structure.logits, structure.result = self._logits.address, result
        self._arguments = kernels.Arguments(structure)
        self._many: ManyBatch | None = None
        for buffer in (self._state, self._positions, self._logits):
            self._stream.fill(buffer, 0)
        self._stream.synchronize()

    def narrow(self, slots: int) -> None:
        self._slots = slots

    def step(self, tokens: NDArray[np.int64]) -> None:
        self._check(tokens)
        with cuda.LOCK:
            if len(tokens) == 1:
                self._step_alone(int(tokens[0]))
            else:
                self._backend.many.step(self._batch(), tokens)
                self._advanced(alone=False)

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._check(tokens[np.arange(tokens.shape[1]) < lengths[:, None]])
        with cuda.LOCK:
            if len(lengths) == 1 and lengths[0] == 1:
                self._step_alone(int(tokens[0, 0]))
            elif lengths.any():
                self._backend.many.prefill(self._batch(), tokens, lengths)
                self._advanced(alone=False)

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        with cuda.LOCK:
            scores = self._backend.many.score(self._batch(), tokens, lengths, rows)
            self._advanced(alone=False)
        return scores

    def logits(self) -> NDArray[np.float32]:
        if self._host_logits is None:
            self._host_logits = cuda.pinned((self.batch, self._config.vocab_size), np.float32)
        if not self._logits_current:
            self._stream.copy_to_host(self._host_logits, self._logits)
            self._logits_current, self._waiting = True, True
        self._wait()
        return self._host_logits

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self._wait()
        slots = self._slots
        if self._alone:
            found, tokens = not self._result[0], self._result[None, 1 : 1 + TOP].view(np.int32)
            largest = self._result[None, 1 + TOP :].view(np.float32)
        else:
            many = self._batch()
            found, tokens, largest = bool((many.found[:slots] >= 0).all()), many.tokens[:slots], many.largest[:slots]
        if k > min(TOP, self._config.vocab_size) or not found or len(tokens) < slots:
            return top_of(self.logits()[:slots], k)
        return tokens[:, :k].astype(np.int64), largest[:, :k].copy()

    def read_state(self, slot: int) -> State:
        self._fold()
        state: dict[str, NDArray[np.generic]] = {}
        for spec in self._backend.manifest.state:
            if spec.layer is None:
                array: NDArray[Any] = np.empty(1, np.int64)
                self._stream.copy_to_host(array, self._positions, 8 * slot)
            else:
                array = np.empty((1, *spec.shape[1:]), np.float32)
                self._stream.copy_to_host(array, self._state, self._place(slot, spec.layer))
            state[spec.input] = array
        self._stream.synchronize()
        return {spec.input: state[spec.input].astype(NUMPY_DTYPES[spec.dtype], copy=False) for spec in self._backend.manifest.state}

    def write_state(self, slot: int, state: State) -> None:
        self._changed()
        arrays = []
        for spec in self._backend.manifest.state:
            if spec.layer is None:
                array: NDArray[Any] = np.ascontiguousarray(state[spec.input], np.int64)
                self._stream.copy_to_device(self._positions, array, 8 * slot)
            else:
                array = np.ascontiguousarray(state[spec.input], np.float32)
                self._stream.copy_to_device(self._state, array, self._place(slot, spec.layer))
            arrays.append(array)
        self._stream.synchronize()

    def _place(self, slot: int, layer: int) -> int:
        return (slot * self._config.num_layers + layer) * self._layer_bytes

    def _batch(self) -> ManyBatch:
        if self._many is None:
            addresses = self._state.address, self._positions.address, self._logits.address
            self._many = self._backend.many.open_batch(self.batch, *addresses)
        return self._many

    def _fold(self) -> None:
        """Bring the state up to date with all steps."""
        if self._many is not None:
            with cuda.LOCK:
                self._backend.many.fold(self._many)

    def _changed(self) -> None:
        """The state is brought up to date, and then changed by another than `many`."""
        self._fold()
        if self._many is not None:
            self._many.drafts = []

    def _check(self, tokens: NDArray[np.int64]) -> None:
        wrong = tokens[(tokens < 0) | (tokens >= self._config.vocab_size)]
        if wrong.size:
            raise UserError(f"token {wrong.flat[0]}: the vocabulary has {self._config.vocab_size}")

    def _step_alone(self, token: int) -> None:
        """One step of the first sequence."""
        self._changed()
        self._arguments.structure.token = token
        self._backend.step_function.launch_together(self._stream, self._backend.plan.blocks, THREADS, self._arguments)
        self._advanced(alone=True)

    def _advanced(self, *, alone: bool) -> None:
        self._logits_current, self._waiting, self._alone = False, True, alone

    def _wait(self) -> None:
        if self._waiting:
            self._stream.synchronize()
            self._waiting = False
