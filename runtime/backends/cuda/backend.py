"""The backend `cuda`: a portable bundle on an NVIDIA GPU, one kernel of our own a token, compiled for this GPU and this model.

Rule: a step is one launch; the state lies on the device once and is updated in place; what crosses to the host is a token in and
the 64 largest logits, which the kernel puts in the host's memory; all logits when asked for.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import NUMPY_DTYPES, State, top_of
from retnet_export.runtime.backends.cuda.compiler import Kernels, compile_kernels, compiler_version
from retnet_export.runtime.backends.cuda.plan import (
    THREADS,
    TOP,
    DeviceLimits,
    StepPlan,
    plan_step,
    state_and_scratch_bytes,
    too_old,
    unsupported,
)
from retnet_export.runtime.backends.cuda.weights import DeviceWeights, UnsupportedError
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError

SPARE_BYTES = 64 << 20
"""Left free when weights are loaded: code, streams, and what CUDA takes for itself."""


class StepStructure(ctypes.Structure):
    """`Params` of step.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                "layers", "head", "embedding", "embedding_scales", "vectors", "phases", "state", "position",
                "mail", "control", "logits", "tile_largest", "next", "result",
            )
        ),
        ("token", ctypes.c_int),
    )  # fmt: skip


RESULT_WORDS = 1 + 2 * TOP
"""`Result` of step.cu, in words of 32 bits: whether more logits are equal than it looks at, tokens, logits."""


def device_limits(index: int = 0) -> DeviceLimits:
    """What CUDA says of a GPU.

    Raises:
        UserError: there is none, or it cannot launch blocks together.
    """
    device = cuda.device(index)
    if not kernels.attribute("CooperativeLaunch", index):
        raise UserError(f"{device.name}: no cooperative launch, which the backend 'cuda' needs")
    return DeviceLimits(device.compute_capability, device.multiprocessors, kernels.attribute("MaxSharedMemoryPerBlockOptin", index))


def unavailable() -> str | None:
    """Why no bundle can run here with these kernels, or None."""
    try:
        if not cuda.device_count():
            return "no NVIDIA GPU that CUDA can use (nvidia-smi)"
        limits = device_limits()
        compiler_version()
    except UserError as error:
        return str(error)
    except (cuda.CudaError, RuntimeError, OSError) as error:
        return f"CUDA does not work here: {error}"
    return too_old(limits)


class CudaBackend:
    """A portable bundle on this machine's GPU.

    Streams may be used by different threads, each by one at a time: their steps take turns on the GPU.

    Args:
        bundle: the bundle.
        ptx: a compute capability whose code, as PTX, is to run instead of this GPU's own: a test of what another GPU would run.
        weights: in place of the bundle's own, for benchmarks.

    Raises:
        UnsupportedError: the kernels cannot run this bundle; another backend can.
        UserError: there is no GPU, NVRTC is missing, or the weights do not fit.
    """

    name, variant = "cuda", "portable"

    def __init__(self, bundle: Bundle, *, ptx: tuple[int, int] | None = None, weights: DeviceWeights | None = None) -> None:
        self.manifest, self.path = bundle.manifest, bundle.path
        config = bundle.manifest.model
        reason = unsupported(config)
        if reason is None and (bundle.manifest.quantization or {}).get("activations"):
            reason = "its activations are quantized"
        if reason is not None:
            raise UnsupportedError(f"{bundle.path}: the backend 'cuda' cannot run it: {reason}")
        limits = device_limits()
        if ptx is not None:
            limits = DeviceLimits(ptx, limits.multiprocessors, min(limits.shared_bytes, 163 << 10))
        self.weights = DeviceWeights.of(bundle) if weights is None else weights
        sources = self.weights.sources
        self.plan: StepPlan = plan_step(
            config,
            bundle.manifest.precision.compute,
            sources.layouts,
            sources.embedding.layout,
            self.weights.layer_vectors,
            self.weights.model_vectors,
            limits,
        )
        self._check_memory()
        self.kernels: Kernels = compile_kernels("step.cu", self.plan.constants, limits.capability, ptx=ptx is not None)
        self.stream = shared_stream()
        self.weights.load(self.stream, cuda.device().compute_capability)
        self.step_function = kernels.Module(self.kernels.image).function("step", self.plan.shared_bytes)
        if self.step_function.blocks_at_once(THREADS) < 1:
            raise UserError(
                f"the backend 'cuda' needs {self.plan.shared_bytes:,} bytes of shared memory and {THREADS} threads a block: this "
                "GPU, or the part of it that this process may use, has less"
            )
        self.mail = cuda.DeviceBuffer(8 * self.plan.packets)
        self.control = cuda.DeviceBuffer(8)
        self.tile_largest = cuda.DeviceBuffer(4 * sources.head.layout.tiles)
        for buffer in (self.mail, self.control, self.tile_largest):
            self.stream.fill(buffer, 0)
        self.stream.synchronize()

    def _check_memory(self) -> None:
        memory, weights = cuda.memory_info(), self.weights
        needed = weights.bytes + weights.largest + state_and_scratch_bytes(self.plan, weights.config) + SPARE_BYTES
        if needed > memory.free:
            raise cuda.CudaMemoryError(
                f"{self.path}: needs {needed:,} bytes on the GPU ({weights.bytes:,} of weights, {weights.largest:,} while loading "
                f"them, {state_and_scratch_bytes(self.plan, weights.config):,} for a sequence), {memory.free:,} of "
                f"{memory.total:,} are free; close other programs or quantize the bundle"
            )

    def structure(self) -> StepStructure:
        """The kernel's argument, as far as it is the same for all sequences."""
        weights, places = self.weights, self.weights.places
        scales = weights.model_vectors["embedding.scales" if places.embedding != places.head else "head.scales"]
        model = places.vectors + 4 * weights.layer_vectors.size * weights.config.num_layers
        return StepStructure(
            layers=weights.address(0),
            head=weights.address(places.head),
            embedding=weights.address(places.embedding),
            embedding_scales=0 if scales < 0 else weights.address(model + 4 * scales),
            vectors=weights.address(places.vectors),
            phases=weights.address(places.phases),
            mail=self.mail.address,
            control=self.control.address,
            tile_largest=self.tile_largest.address,
        )

    def open_stream(self, batch: int) -> CudaStream:
        fixed = self.manifest.graphs["decode"].inputs[0].shape[0]
        if batch < 1 or fixed not in (-1, batch):
            raise UserError(f"{self.path}: exported for batch {fixed}, asked for {batch}; export it without --batch")
        return CudaStream(self, batch)


class CudaStream:
    """State, position and logits of a batch of sequences, which step one after another."""

    def __init__(self, backend: CudaBackend, batch: int) -> None:
        self._backend, self.batch, self._stream = backend, batch, backend.stream
        config = backend.manifest.model
        self._config, self._layer_bytes = config, 4 * config.state_elements // config.num_layers
        self._state = cuda.DeviceBuffer(batch * 4 * config.state_elements)
        self._positions = cuda.DeviceBuffer(8 * batch)
        self._next = cuda.DeviceBuffer(4 * batch)
        self._logits = cuda.DeviceBuffer(4 * batch * config.vocab_size)
        self._results, results = kernels.mapped((batch, RESULT_WORDS), np.uint32)
        self._host_logits: NDArray[np.float32] | None = None
        self._logits_current, self._waiting = False, False
        self._arguments = []
        for slot in range(batch):
            structure = backend.structure()
            structure.state = self._state.address + slot * 4 * config.state_elements
            structure.position = self._positions.address + 8 * slot
            structure.next = self._next.address + 4 * slot
            structure.logits = self._logits.address + 4 * slot * config.vocab_size
            structure.result = results + 4 * RESULT_WORDS * slot
            self._arguments.append(kernels.Arguments(structure))
        for buffer in (self._state, self._positions, self._next, self._logits):
            self._stream.fill(buffer, 0)
        self._stream.synchronize()

    def step(self, tokens: NDArray[np.int64]) -> None:
        for slot, token in enumerate(tokens.tolist()):
            self._launch(slot, token)
        self._advanced()

    def step_on(self) -> None:
        """Read, in every slot, the token with the largest logit of the last step; it never leaves the device."""
        for slot in range(self.batch):
            self._launch(slot, -1)
        self._advanced()

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        for slot, (row, length) in enumerate(zip(tokens, lengths.tolist(), strict=True)):
            for token in row[:length].tolist():
                self._launch(slot, token)
        self._advanced()

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = np.zeros((*rows.shape, self._config.vocab_size), np.float32)
        for slot, (row, length, wanted) in enumerate(zip(tokens, lengths.tolist(), rows, strict=True)):
            kept: cuda.DeviceBuffer | None = None
            for index in range(max(int(wanted.max(initial=-1)) + 1, length)):
                if index == length:  # what follows are drafts, of which no trace is to be left
                    kept = self._keep(slot)
                self._launch(slot, int(row[index]))
                for place in np.flatnonzero(wanted == index).tolist():
                    self._stream.copy_to_host(scores[slot, place], self._logits, 4 * slot * self._config.vocab_size)
            if kept is not None:
                self._restore(slot, kept)
            self._stream.synchronize()
        self._advanced()
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
        if k > min(TOP, self._config.vocab_size) or self._results[:, 0].any():
            return top_of(self.logits(), k)
        tokens = self._results[:, 1 : 1 + k].astype(np.int64)
        return tokens, self._results[:, 1 + TOP : 1 + TOP + k].view(np.float32).copy()

    def read_state(self, slot: int) -> State:
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

    def _launch(self, slot: int, token: int) -> None:
        """One step of one sequence; token -1 is the last one chosen."""
        if not -1 <= token < self._config.vocab_size:
            raise UserError(f"token {token}: the vocabulary has {self._config.vocab_size}")
        arguments, backend = self._arguments[slot], self._backend
        arguments.structure.token = token
        backend.step_function.launch_together(self._stream, backend.plan.blocks, THREADS, arguments)

    def _keep(self, slot: int) -> cuda.DeviceBuffer:
        size = 4 * self._config.state_elements
        kept = cuda.DeviceBuffer(size + 8)
        self._stream.copy(kept, self._state, size, 0, slot * size)
        self._stream.copy(kept, self._positions, 8, size, 8 * slot)
        return kept

    def _restore(self, slot: int, kept: cuda.DeviceBuffer) -> None:
        size = 4 * self._config.state_elements
        self._stream.copy(self._state, kept, size, slot * size, 0)
        self._stream.copy(self._positions, kept, 8, 8 * slot, size)

    def _advanced(self) -> None:
        self._logits_current, self._waiting = False, True

    def _wait(self) -> None:
        if self._waiting:
            self._stream.synchronize()
            self._waiting = False


def shared_stream() -> cuda.Stream:
    """The stream of every model of the process: their steps use all of the GPU, so they could not overlap anyway."""
    with cuda.LOCK:
        return _one_stream()


@functools.cache
def _one_stream() -> cuda.Stream:
    return cuda.Stream()
