"""The list of backends, and the choice of one for a bundle. What is particular to one it says in its `Registration`."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from retnet_export.runtime.errors import ArgumentError, BackendWarning, UserError, one_of

if TYPE_CHECKING:
    from retnet_export.runtime.backends.base import Backend
    from retnet_export.runtime.backends.registration import Registration
    from retnet_export.runtime.bundle.bundle import Bundle

THREADS_PER_CORE = 4
Backends = Literal["auto", "cuda", "onnxruntime", "tensorrt", "tensorrt-rtx"]
NAMES: tuple[str, ...] = get_args(Backends)
MODULES: Mapping[str, str] = {
    "onnxruntime": "onnxruntime",
    "cuda": "cuda.backend",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
}
"""Where each backend is, and registers itself in `REGISTRATIONS`; imported when it is asked for."""


def registered(name: str) -> Registration:
    """The registration of a backend, by its name in `MODULES`."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    registrations: tuple[Registration, ...] = module.REGISTRATIONS
    return next(each for each in registrations if each.name == name)


def open_backend(name: str, bundle: Bundle, threads: int | None = None, low_memory: bool | None = None) -> Backend:
    """Load a bundle into the backend called `name`.

    "auto" takes the first that works: an engine compiled for this machine's GPU, our own kernels on it, ONNX Runtime on the
    CPU. With threads given, the CPU is meant. A warning names a GPU that could be used but is not.

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
        name = "onnxruntime"
    return registered(name).open(bundle, threads, low_memory)


def check_threads(threads: int | None) -> None:
    """Refuse more threads than a machine can use: a hundred thousand threads never finish.

    Raises:
        UserError: there are more than four a core, or none.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= THREADS_PER_CORE * cores:
        raise ArgumentError(
            "threads",
            f"is {threads}, expected 1 to {THREADS_PER_CORE * cores}: this machine has {cores} cores, and more threads "
            f"than cores only wait for each other; give {cores}, or omit it",
        )


def _on_gpu(bundle: Bundle, low_memory: bool | None) -> Backend | None:
    """The fastest backend on this machine's GPU; None if there is none for this bundle."""
    from retnet_export.runtime.bundle.engines import read_engines
    from retnet_export.runtime.device.cuda import CudaError

    targets = dict.fromkeys(record.target for record in read_engines(bundle))
    for name in (*targets, "cuda"):
        backend = registered(name)
        if backend.unavailable() is not None:
            continue
        try:
            return backend.open(bundle, None, low_memory)
        except (UserError, CudaError) as error:
            if name == "cuda":  # an engine may well be compiled for another machine
                warnings.warn(f"{error}. It runs on the CPU.", BackendWarning, stacklevel=3)
    return None
