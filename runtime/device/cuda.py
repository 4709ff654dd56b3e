"""CUDA through cuda-python's runtime bindings: memory, streams, graphs, events. The only module that calls CUDA itself.

Rules: every return code is checked; an allocation belongs to one object and is freed with it, by the library that made it; every
copy names its stream; one thread calls CUDA at a time, because a capture in one fails if another allocates, frees or touches the
stream meanwhile.
It needs the package `cuda-bindings` and a driver, neither torch nor a CUDA toolkit.

    stream = Stream()
    state = DeviceBuffer(1 << 20)
    stream.fill(state, 0)
    logits = pinned((1, 50304), np.float32)
    stream.copy_to_host(logits, state)
    stream.synchronize()
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from retnet_export.runtime.errors import MissingExtraError, UserError

LOST = frozenset(
    ("cudaErrorIllegalAddress", "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc",
     "cudaErrorIllegalInstruction", "cudaErrorHardwareStackError", "cudaErrorAssert", "cudaErrorLaunchFailure",
     "cudaErrorLaunchTimeout", "cudaErrorECCUncorrectable", "cudaErrorContained",
     "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_MISALIGNED_ADDRESS", "CUDA_ERROR_INVALID_ADDRESS_SPACE", "CUDA_ERROR_INVALID_PC",
     "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_ASSERT", "CUDA_ERROR_LAUNCH_FAILED",
     "CUDA_ERROR_LAUNCH_TIMEOUT", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_CONTAINED")
)  # fmt: skip
"""Errors after which a process cannot use the GPU any more, as runtime and driver call them (CUDA's reference of cudaError_t)."""
OUT_OF_MEMORY = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")
T = TypeVar("T", bound=np.generic)
LOCK = threading.RLock()
"""Held during every call of CUDA, and by those who let a library call it.

Reentrant, because the garbage collector may free memory during a call.
"""
NO_DEVICE = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorStubLibrary")
"""Answers of a machine without a usable NVIDIA GPU or driver."""


class CudaError(RuntimeError):
    """A CUDA call failed; `code` is the name of its error, as in cudaError_t."""

    def __init__(self, call: str, code: str, text: str) -> None:
        super().__init__(f"{call} failed: {code} ({text})")
        self.call, self.code = call, code


class DeviceLostError(CudaError, UserError):
    """The GPU stopped in the middle of something: CUDA answers every further call of this process with an error."""

    def __init__(self, call: str, code: str, text: str) -> None:
        super().__init__(call, code, text)
        self.args = (
            f"the GPU stopped in the middle of its work ({call}: {code}, {text}). This process cannot use it any more: start "
            "the program again. If it happens again, look for 'Xid' or 'nvgpu' in the kernel's log (dmesg) and report it",
        )


class CudaMemoryError(UserError):
    """The device has no room for an allocation."""


def failure(call: str, code: str, text: str) -> CudaError:
    """The error for a call that failed."""
    return (DeviceLostError if code in LOST else CudaError)(call, code, text)


@functools.cache
def library() -> ModuleType:
    """The bindings of the CUDA runtime.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "cuda", "running on an NVIDIA GPU") from error
    return runtime  # type: ignore[no-any-return]


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and check what it returns.

    Args:
        name: as in the CUDA runtime API, "cudaMalloc".
        arguments: its arguments, without those that receive results.

    Returns:
        Its result; None if it has none, a tuple if it has several.

    Raises:
        CudaError: it returned an error.
        MissingExtraError: cuda-bindings is not installed.
    """
    runtime = library()
    with LOCK:
        code, *results = getattr(runtime, name)(*arguments)
    if code != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(code)
        raise failure(name, code.name, text.decode(errors="replace"))
    return None if not results else results[0] if len(results) == 1 else tuple(results)


@dataclass(frozen=True)
class MemoryInfo:
    """Memory of the current device, in bytes; on a Jetson, whose memory is shared, what the system leaves."""

    free: int
    total: int


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        index: CUDA's number for it.
        name: the vendor's name.
        compute_capability: major and minor.
        memory_bytes: its memory.
        multiprocessors: how many.
        l2_bytes: size of the level-2 cache.
        integrated: whether it shares its memory with the CPU, as a Jetson does.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    l2_bytes: int
    integrated: bool


def device_count() -> int:
    """GPUs that CUDA can use here; 0 without a driver.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
    """
    try:
        return int(call("cudaGetDeviceCount"))
    except CudaError as error:
        if error.code in NO_DEVICE:
            return 0
        raise


def unavailable() -> str | None:
    """Why no GPU can be used here, and what to do; None if one can."""
    try:
        if device_count():
            device()
            return None
    except UserError as error:
        return str(error)
    except (RuntimeError, OSError) as error:
        return f"CUDA does not work here: {error}; restart, or install the driver again"
    return (
        "no NVIDIA GPU that CUDA can use; if this machine has one, its driver is missing (nvidia-smi) or older than cuda-bindings "
        "(for a driver of CUDA 12, as on JetPack 6: pip install 'cuda-bindings<13')"
    )


def device(index: int = 0) -> Device:
    """What CUDA says of a GPU.

    Raises:
        UserError: there is no such GPU.
    """
    count = device_count()
    if not 0 <= index < count:
        raise UserError(f"no CUDA device {index}: this machine has {count}; is the NVIDIA driver loaded (nvidia-smi)?")
    properties = call("cudaGetDeviceProperties", index)
    return Device(
        index=index,
        name=properties.name.decode(),
        compute_capability=(properties.major, properties.minor),
        memory_bytes=properties.totalGlobalMem,
        multiprocessors=properties.multiProcessorCount,
        l2_bytes=properties.l2CacheSize,
        integrated=bool(properties.integrated),
    )


def memory_info() -> MemoryInfo:
    """Free and total memory of the current device.

    Raises:
        CudaMemoryError: there is not even enough for CUDA's own part of this process.
    """
    try:
        free, total = call("cudaMemGetInfo")
    except CudaError as error:
        if error.code not in OUT_OF_MEMORY:
            raise
        raise CudaMemoryError("the GPU has no free memory for CUDA itself; close other programs") from error
    return MemoryInfo(int(free), int(total))


def versions() -> tuple[int, int]:
    """The CUDA versions of the driver and of the runtime, as CUDA numbers them: 12060 is 12.6; driver 0 means none."""
    return int(call("cudaDriverGetVersion")), int(call("cudaRuntimeGetVersion"))


class DeviceBuffer:
    """Bytes on the device, freed with `close` or with the object; in pieces if they do not fit as one (pieces.py).

    Args:
        size: how many bytes; at least one is allocated, so that every buffer has an address of its own.

    Raises:
        CudaMemoryError: they do not fit.
    """

    def __init__(self, size: int) -> None:
        from retnet_export.runtime.device.pieces import largest_allocation

        self.bytes = size
        largest = largest_allocation()
        if largest is not None and size > largest:
            self._map(size, largest)
            return
        try:
            self._address = int(call("cudaMalloc", max(size, 1)))
        except CudaError as error:
            if error.code not in OUT_OF_MEMORY:
                raise
            memory = memory_info()
            if memory.free <= size:
                raise _no_memory(size, memory, "") from error
            self._map(size, size // 2)
            return
        self._finalizer = _freed_with(self, "cudaFree", self._address)

    def _map(self, size: int, largest: int) -> None:
        """Take pieces under one address."""
        from retnet_export.runtime.device.pieces import Pieces

        try:
            pieces = Pieces(size, largest)
        except (CudaError, AttributeError) as error:  # AttributeError: a cuda-bindings without these functions
            hint = f"; in pieces it did not go either ({error}): close other programs or restart"
            raise _no_memory(size, memory_info(), hint) from error
        self._address = pieces.address
        self._finalizer = weakref.finalize(self, _free, pieces.close, None)
        self._finalizer.atexit = False

    @property
    def address(self) -> int:
        """Its device address.

        Raises:
            ValueError: it was closed.
        """
        if not self._finalizer.alive:
            raise ValueError("this device buffer was closed")
        return self._address

    def close(self) -> None:
        """Free it; twice does nothing."""
        self._finalizer()


def _no_memory(size: int, memory: MemoryInfo, hint: str) -> CudaMemoryError:
    return CudaMemoryError(
        f"the GPU has no memory for {size:,} bytes: {memory.free:,} of {memory.total:,} are free{hint}; "
        "take a smaller batch or quantized weights"
    )


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A zeroed host array that the GPU copies to and from without a detour; freed with the last view of it."""
    kind = np.dtype(dtype)
    size = max(math.prod(shape) * kind.itemsize, 1)
    address = int(call("cudaHostAlloc", size, 0))
    raw = (ctypes.c_byte * size).from_address(address)
    _freed_with(raw, "cudaFreeHost", address)
    array: NDArray[Any] = np.frombuffer(memoryview(raw), kind, math.prod(shape)).reshape(shape)
    array[...] = 0
    return array


class Stream:
    """A CUDA stream of its own (never the default one): work on it runs in order, and apart from other streams."""

    def __init__(self) -> None:
        runtime = library()
        self._stream = call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        _freed_with(self, "cudaStreamDestroy", self._stream)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done; faults of earlier work show here."""
        call("cudaStreamSynchronize", self._stream)

    def fill(self, target: DeviceBuffer, value: int, size: int | None = None, offset: int = 0) -> None:
        """Set bytes of a buffer to `value`, all of them unless `size` says how many."""
        size = target.bytes - offset if size is None else size
        _check_range("fill", target.bytes, offset, size)
        call("cudaMemsetAsync", target.address + offset, value, size, self._stream)

    def copy_to_device(self, target: DeviceBuffer, source: NDArray[Any], offset: int = 0) -> None:
        """Copy a host array to `offset` bytes into a buffer. It must stay as it is until the stream has got there."""
        _check_array(source)
        _check_range("copy to the device", target.bytes, offset, source.nbytes)
        self._copy(target.address + offset, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def copy_to_host(self, target: NDArray[Any], source: DeviceBuffer, offset: int = 0) -> None:
        """Fill a host array from `offset` bytes into a buffer; read it after `synchronize`."""
        _check_array(target)
        _check_range("copy to the host", source.bytes, offset, target.nbytes)
        self._copy(target.ctypes.data, source.address + offset, target.nbytes, "cudaMemcpyDeviceToHost")

    def copy(
        self, target: DeviceBuffer, source: DeviceBuffer, size: int | None = None, target_offset: int = 0, source_offset: int = 0
    ) -> None:
        """Copy between buffers on the device: all of `source` unless `size` says how much."""
        size = source.bytes - source_offset if size is None else size
        _check_range("copy on the device", source.bytes, source_offset, size)
        _check_range("copy on the device", target.bytes, target_offset, size)
        self._copy(target.address + target_offset, source.address + source_offset, size, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        call("cudaMemcpyAsync", target, source, size, getattr(library().cudaMemcpyKind, kind), self._stream)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what the block puts on the stream, instead of running it; the graph is ready after the block.

        Raises:
            CudaError: something in the block cannot be captured.
        """
        runtime = library()
        graph = Graph()
        with LOCK:
            call("cudaStreamBeginCapture", self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                yield graph
            except BaseException:
                # The stream stays unusable until its capture is ended; the block's own error is the one to show.
                with contextlib.suppress(CudaError):
                    call("cudaGraphDestroy", call("cudaStreamEndCapture", self._stream))
                raise
            graph._instantiate(call("cudaStreamEndCapture", self._stream))

    def launch(self, graph: Graph) -> None:
        """Run a captured graph."""
        call("cudaGraphLaunch", graph._executable, self._stream)

    def record(self, event: Event) -> None:
        """Mark the point that the stream has got to."""
        call("cudaEventRecord", event._event, self._stream)


class Graph:
    """Work captured from a stream; made by `Stream.capture`, run by `Stream.launch`."""

    def __init__(self) -> None:
        self._executable: Any = None

    def _instantiate(self, captured: Any) -> None:
        try:
            self._executable = call("cudaGraphInstantiate", captured, 0)
        finally:
            call("cudaGraphDestroy", captured)
        _freed_with(self, "cudaGraphExecDestroy", self._executable)


class Event:
    """A point in a stream, for timing."""

    def __init__(self) -> None:
        self._event = call("cudaEventCreate")
        _freed_with(self, "cudaEventDestroy", self._event)

    def synchronize(self) -> None:
        """Wait until the stream has passed it; of one that was never recorded, not at all."""
        call("cudaEventSynchronize", self._event)

    def milliseconds_since(self, earlier: Event) -> float:
        """Time between two recorded events, once the stream has passed both."""
        call("cudaEventSynchronize", self._event)
        return float(call("cudaEventElapsedTime", earlier._event, self._event))


def _freed_with(owner: object, name: str, resource: Any) -> weakref.finalize[..., Any]:
    """Free a resource when its owner goes, or when what is returned is called.

    The function is looked up now: what frees is the library that allocated, and it stays loaded for as long as the owner lives.
    """
    finalizer = weakref.finalize(owner, _free, getattr(library(), name), resource)
    finalizer.atexit = False  # the driver frees what is left when a process ends, and may be gone before us
    return finalizer


def _free(function: Callable[[Any], Any], resource: Any) -> None:
    # Its answer is not looked at: a finalizer has nobody to tell, and a driver that is shutting down has freed everything already.
    with LOCK:
        function(resource)


def _check_array(array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous, so it cannot be copied as one block")


def _check_range(what: str, available: int, offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > available:
        raise ValueError(f"{what}: {size} bytes at {offset} exceed a buffer of {available} bytes")
