"""A CUDA runtime without a GPU, stricter than the real one: what `retnet_export.runtime.device.cuda` calls, on host memory.

Work on a stream runs when the stream is synchronized and not a moment earlier, so a host buffer that is changed or read too
early shows. Every address is looked up: one that was freed, never allocated, or too small for the copy ends the test. Names,
argument orders and error codes are those of cuda.bindings.runtime; a test holds them against it.
"""

# ruff: noqa: N801, N802, N815 (the names are CUDA's)
from __future__ import annotations

import ctypes
import enum
import gc
from collections.abc import Callable
from types import SimpleNamespace


class Misuse(BaseException):
    """What the real runtime might let pass, or answer with a crash. Not an Exception: nothing may catch it by accident."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess


class Handle(int):
    """An opaque handle, as cuda-bindings has a class for each."""


class CudaDouble:
    """The module cuda.bindings.runtime.

    Attributes:
        memory: bytes of the device.
        copied_to_host: bytes copied to the host so far.
        synchronizations: how often the host waited.
        launches: how many graphs ran.
        refuse_capture: whether every capture fails, as with a library that allocates in it.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrCooperativeLaunch=95)

    def __init__(self, capability: tuple[int, int] = (8, 7), memory: int = 1 << 30) -> None:
        self.capability, self.memory = capability, memory
        self.device: dict[int, ctypes.Array] = {}
        self.host: dict[int, ctypes.Array] = {}
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.captured: dict[int, list[Callable[[], None]] | None] = {}
        self.invalidated: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next = 1000
        self.copied_to_host = self.synchronizations = self.launches = 0
        self.refuse_capture = False

    # Devices and memory

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaDeviceGetAttribute(self, attribute, device):
        return OK, 0  # it runs no kernels, together or otherwise

    def cudaGetDeviceProperties(self, device):
        major, minor = self.capability
        return OK, SimpleNamespace(
            name=b"Double", major=major, minor=minor, totalGlobalMem=self.memory, multiProcessorCount=8, l2CacheSize=1, integrated=1
        )

    def cudaMemGetInfo(self):
        return OK, self.memory - sum(map(ctypes.sizeof, self.device.values())), self.memory

    def cudaDriverGetVersion(self):
        return OK, 12060

    cudaRuntimeGetVersion = cudaDriverGetVersion

    def cudaGetErrorString(self, code):
        return OK, code.name.encode()

    def cudaMalloc(self, size):
        if size > self.cudaMemGetInfo()[1]:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return OK, self._allocate(self.device, size)

    def cudaHostAlloc(self, size, flags):
        return OK, self._allocate(self.host, size)

    def cudaFree(self, address):
        self._finish()
        if self.device.pop(address, None) is None:
            raise Misuse(f"cudaFree of {address:#x}, which is not allocated")
        return (OK,)

    def cudaFreeHost(self, address):
        self._finish()
        if self.host.pop(address, None) is None:
            raise Misuse(f"cudaFreeHost of {address:#x}, which is not allocated")
        return (OK,)

    def _finish(self) -> None:
        """Freeing memory waits for the device, as the real one does."""
        for stream in list(self.pending):
            self._run(stream)

    def _run(self, stream: int) -> None:
        """Do what is pending, item by item: if one lets Python collect a buffer, what else uses that is done before it is freed."""
        work, collects = self.pending[stream], gc.isenabled()
        while work:
            item = work.pop(0)
            gc.disable()  # a device does not collect in the middle of its work
            try:
                item()
            finally:
                if collects:
                    gc.enable()

    def _allocate(self, table: dict[int, ctypes.Array], size: int) -> int:
        block = (ctypes.c_ubyte * size)(*([0xAA] * min(size, 64)))  # never zero by chance
        table[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def check_device(self, address: int, size: int) -> None:
        """Fail unless the bytes are within one live allocation."""
        for start, block in self.device.items():
            if start <= address and address + size <= start + ctypes.sizeof(block):
                return
        raise Misuse(f"{size} bytes at {address:#x} are not within device memory that is allocated now")

    # Streams

    def cudaStreamCreateWithFlags(self, flags):
        handle = self._handle()
        self.pending[handle], self.captured[handle] = [], None
        return OK, handle

    def cudaStreamDestroy(self, stream):
        del self.pending[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        if self.captured[stream] is not None:
            self.invalidated.add(stream)
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.synchronizations += 1
        self._run(stream)
        return (OK,)

    def cudaMemsetAsync(self, address, value, size, stream):
        self.check_device(address, size)
        self.enqueue(stream, lambda: ctypes.memset(address, value, size) and None)
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        to_device, from_device = kind in (1, 3), kind in (2, 3)

        def copy() -> None:
            if to_device:
                self.check_device(target, size)
            if from_device:
                self.check_device(source, size)
            ctypes.memmove(target, source, size)
            self.copied_to_host += size * (kind == 2)

        for address, on_device in ((target, to_device), (source, from_device)):
            if on_device:
                self.check_device(address, size)
            elif any(start <= address < start + ctypes.sizeof(block) for start, block in self.device.items()):
                raise Misuse(f"{kind.name}: {address:#x} is device memory")
        self.enqueue(stream, copy)
        return (OK,)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Put work on a stream, or into the graph that is being captured from it."""
        if stream not in self.pending:
            raise Misuse(f"stream {stream} was destroyed or never made")
        captured = self.captured[stream]
        (self.pending[stream] if captured is None else captured).append(work)

    # Graphs and events

    def cudaStreamBeginCapture(self, stream, mode):
        self.captured[stream] = []
        if self.refuse_capture:
            self.invalidated.add(stream)
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        work, self.captured[stream] = self.captured[stream], None
        if stream in self.invalidated:
            self.invalidated.remove(stream)
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = self._handle()
        self.graphs[graph] = work or []
        return OK, graph

    def cudaGraphInstantiate(self, graph, flags):
        executable = self._handle()
        self.graphs[executable] = list(self.graphs[graph])
        return OK, executable

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, executable, stream):
        self.launches += 1
        for work in self.graphs[executable]:
            self.enqueue(stream, work)
        return (OK,)

    def _handle(self) -> Handle:
        self._next += 1
        return Handle(self._next)
