"""Kernels of our own on the device, through CUDA's driver API: modules, functions, launches, and what a device allows a block.

Rules are those of runtime/device/cuda.py, in whose context this works: every return code is checked, and one thread at a time calls
CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import MissingExtraError


@functools.cache
def _driver() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "cuda", "running on an NVIDIA GPU") from error
    return driver  # type: ignore[no-any-return]


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver and check what it returns; as `cuda.call`.

    Raises:
        CudaError: it returned an error.
    """
    driver = _driver()
    with cuda.LOCK:
        code, *results = getattr(driver, name)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        raise cuda.failure(name, code.name, text.decode(errors="replace") if text else "unknown error")
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def attribute(name: str, device: int = 0) -> int:
    """A device attribute, by its name in cudaDeviceAttr without the prefix: "CooperativeLaunch"."""
    runtime = cuda.library()
    return int(cuda.call("cudaDeviceGetAttribute", getattr(runtime.cudaDeviceAttr, f"cudaDevAttr{name}"), device))


@functools.cache
def _overlapping() -> bool:
    """Whether this GPU has programmatic dependent launch."""
    return attribute("ComputeCapabilityMajor") >= 9


@functools.cache
def _overlap() -> Any:
    """The launch attribute that says so."""
    driver = _driver()
    given, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    given.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    given.value = value
    return given


class Module:
    """Loaded machine code; unloaded with the object.

    Args:
        image: a cubin or PTX.

    Raises:
        CudaMemoryError: there is no memory for it.
    """

    def __init__(self, image: bytes) -> None:
        cuda.call("cudaFree", 0)  # the runtime's context, if nothing has made it current yet in this thread
        terminated = np.frombuffer(image + b"\0", np.uint8)  # PTX is text; held while CUDA reads it
        try:
            self._module = call("cuModuleLoadData", terminated.ctypes.data)
        except cuda.CudaError as error:
            if error.code not in cuda.OUT_OF_MEMORY:
                raise
            memory = cuda.memory_info()
            raise cuda.CudaMemoryError(
                f"the GPU has no memory for kernels: {memory.free:,} of {memory.total:,} bytes are free; close other programs"
            ) from error
        finalizer = weakref.finalize(self, _unload, _driver().cuModuleUnload, self._module)
        finalizer.atexit = False

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """A kernel of it, that may have so much dynamic shared memory."""
        return Function(self, call("cuModuleGetFunction", self._module, name.encode()), shared_bytes)


class Function:
    """A kernel; made by `Module.function`."""

    def __init__(self, module: Module, handle: Any, shared_bytes: int) -> None:
        self._module, self._handle, self._shared = module, handle, shared_bytes
        if shared_bytes:
            limit = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", handle, limit, shared_bytes)

    def blocks_at_once(self, threads: int) -> int:
        """How many blocks of it a multiprocessor can hold."""
        return int(call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._handle, threads, self._shared))

    def launch(self, stream: cuda.Stream, blocks: tuple[int, int], threads: tuple[int, int], arguments: Arguments) -> None:
        """Put a launch on a stream; blocks and threads along x and y."""
        call("cuLaunchKernel", self._handle, *blocks, 1, *threads, 1, self._shared, stream.handle, arguments.address, 0)

    def launch_after(
        self, stream: cuda.Stream, grid: tuple[int, int, int], threads: int, arguments: Arguments, *, overlaps: bool
    ) -> None:
        """Put a launch on a stream; it may begin before the one in front ends, if that and the GPU allow it."""
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared, driver.CUstream(stream.handle)
        if overlaps and _overlapping():
            config.attrs, config.numAttrs = [_overlap()], 1
        call("cuLaunchKernelEx", config, self._handle, arguments.address, 0)

    def launch_together(self, stream: cuda.Stream, blocks: int, threads: int, arguments: Arguments) -> None:
        """Put a cooperative launch on a stream: all blocks run at once, or none."""
        call("cuLaunchCooperativeKernel", self._handle, blocks, 1, 1, threads, 1, 1, self._shared, stream.handle, arguments.address)


class Arguments:
    """The one argument of a kernel that takes a structure; read when the kernel is launched.

    Args:
        structure: the structure, which the caller may change between launches.
    """

    def __init__(self, structure: ctypes.Structure) -> None:
        self.structure = structure
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
        self.address = ctypes.addressof(self._pointers)


def mapped(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[NDArray[Any], int]:
    """A zeroed host array that kernels write by address: the array, and its address on the device. Freed with the last view."""
    array = cuda.pinned(
        shape, dtype
    )  # with unified addressing, which every GPU of compute capability 8 has, both addresses are one
    return array, array.ctypes.data


def _unload(function: Any, module: Any) -> None:
    with cuda.LOCK:
        function(module)
