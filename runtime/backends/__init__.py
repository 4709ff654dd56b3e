"""Backends by name, and which of them works here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.backends.base import Backend
    from retnet_export.runtime.bundle import Bundle

NAMES = ("auto", "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


def open_backend(name: str, bundle: Bundle, threads: int | None = None, low_memory: bool | None = None) -> Backend:
    """Load a bundle into the backend called `name`; "auto" takes the fastest that works.

    Raises:
        UserError: no such backend, or it does not work here.
    """
    if name not in NAMES:
        raise UserError(f"no backend {name!r}; there are {', '.join(NAMES)}")
    if name in ("tensorrt", "tensorrt-rtx"):
        from retnet_export.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, name)
    from retnet_export.runtime.backends import onnxruntime_cuda

    for_cpu = bundle.manifest.dialect == "onnxruntime-cpu"
    if for_cpu and name == "onnxruntime-cuda":
        raise UserError(
            f"{bundle.path}: its graphs are in the onnxruntime-cpu dialect, not made for {name}; "
            "convert the portable bundle with --dialect onnxruntime-cuda"
        )
    # With threads given, the CPU is meant.
    auto_cuda = name == "auto" and threads is None and not for_cpu and onnxruntime_cuda.unavailable() is None
    if name == "onnxruntime-cuda" or auto_cuda:
        try:
            return onnxruntime_cuda.OnnxRuntimeCudaBackend(bundle)
        except UserError:
            if name != "auto" or bundle.manifest.dialect == "onnxruntime-cuda":
                raise
    from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, threads, low_memory)
