"""Backends by name, and which of them works here."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Literal, get_args

from retnet_export.runtime.errors import ArgumentError, BackendWarning, UserError, one_of

if TYPE_CHECKING:
    from retnet_export.runtime.backends.base import Backend
    from retnet_export.runtime.bundle.bundle import Bundle

THREADS_PER_CORE = 4
Backends = Literal["auto", "cuda", "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
NAMES: tuple[str, ...] = get_args(Backends)


def open_backend(name: str, bundle: Bundle, threads: int | None = None, low_memory: bool | None = None) -> Backend:
    """Load a bundle into the backend called `name`.

    "auto" takes the first that works: an engine compiled for this machine's GPU, our own kernels on it, ONNX Runtime on the GPU,
    ONNX Runtime on the CPU. With threads given, the CPU is meant. A GPU that is passed over although it could be used is named in
    a warning.

    Raises:
        UserError: no such backend, or it does not work here.
    """
    check_threads(threads)
    if name not in NAMES:
        raise ArgumentError("backend", f"is {name!r}, expected {one_of(NAMES)}")
    if name == "auto":
        backend = None if threads is not None else _on_gpu(bundle, low_memory)
        if backend is not None:
            return backend
    elif name in ("tensorrt", "tensorrt-rtx"):
        from retnet_export.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, name)
    elif name == "cuda":
        from retnet_export.runtime.backends.cuda.backend import CudaBackend

        return CudaBackend(bundle)
    elif name == "onnxruntime-cuda":
        from retnet_export.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(bundle, low_memory=low_memory)
    from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, threads, low_memory)


def check_threads(threads: int | None) -> None:
    """Refuse threads that a machine can only spend on one another: a hundred thousand of them never come to an end.

    Raises:
        UserError: there are more than four a core, or none.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= THREADS_PER_CORE * cores:
        raise ArgumentError(
            "threads",
            f"is {threads}, expected 1 to {THREADS_PER_CORE * cores}: this machine has {cores} cores, and more threads "
            f"than cores only wait for one another; give {cores}, or leave it out",
        )


def _on_gpu(bundle: Bundle, low_memory: bool | None) -> Backend | None:
    """The fastest backend on this machine's GPU; None if there is none for this bundle."""
    from retnet_export.runtime.backends import onnxruntime_cuda
    from retnet_export.runtime.backends.cuda import backend as own_kernels
    from retnet_export.runtime.bundle.engines import read_engines
    from retnet_export.runtime.device.cuda import CudaError

    for target in dict.fromkeys(record.target for record in read_engines(bundle)):
        from retnet_export.runtime.backends.tensorrt import TensorRtBackend

        try:
            return TensorRtBackend(bundle, target)
        except (UserError, CudaError):
            continue  # compiled for another machine, or TensorRT or the GPU is missing here
    if own_kernels.unavailable() is None:
        try:
            return own_kernels.CudaBackend(bundle)
        except (UserError, CudaError) as error:
            warnings.warn(f"{error}. Trying the other backends.", BackendWarning, stacklevel=3)
    if onnxruntime_cuda.unavailable() is not None:
        return None
    try:
        return onnxruntime_cuda.OnnxRuntimeCudaBackend(bundle, low_memory=low_memory)
    except UserError:
        return None
