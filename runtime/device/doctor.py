"""What this machine has, what works on it, and the one command that would mend what does not."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from retnet_export.runtime.backends.onnxruntime_api import slow_when_quantized
from retnet_export.runtime.device import jetson
from retnet_export.runtime.errors import EXTRAS, UserError

DISTRIBUTIONS = ("retnet-export", "numpy", "onnxruntime", "onnx", "onnx-ir", "torch", "tokenizers", "safetensors")


class Report(TypedDict):
    """What `doctor --json` prints; `works` maps a purpose to None, or to what would make it work.

    `gpu` is empty without an NVIDIA GPU that CUDA can use, `jetson` on anything else than a Jetson.
    """

    machine: dict[str, str]
    gpu: dict[str, str]
    jetson: dict[str, str]
    packages: dict[str, str]
    works: dict[str, str | None]


def examine() -> Report:
    """Look at the machine; never raises because something is missing or unknown."""
    works: dict[str, str | None] = {"generate on the CPU (onnxruntime)": what_is_missing(("onnxruntime",))}
    works["run quantized bundles fast on the CPU"] = works["generate on the CPU (onnxruntime)"] or slow_when_quantized(
        _version("onnxruntime")
    )
    gpu, no_gpu = _gpu()
    works["generate on an NVIDIA GPU (cuda)"] = no_gpu or _own_kernels(gpu)
    works["generate on an NVIDIA GPU (onnxruntime-cuda)"] = no_gpu or _onnxruntime_cuda()
    for target in ("tensorrt", "tensorrt-rtx"):
        version_here, fault = _tensorrt(target)
        if version_here is not None:
            gpu[target] = version_here
        works[f"run and compile on this GPU ({target})"] = fault or no_gpu or _unsupported(target, gpu)
    works["compile for RTX GPUs that are not here"] = _tensorrt("tensorrt-rtx")[1]
    return Report(
        gpu=gpu,
        jetson=jetson.describe(),
        machine={
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "memory": _memory(),
            "python": platform.python_version(),
        },
        packages={name: _version(name) for name in DISTRIBUTIONS},
        works=works,
    )


def what_is_missing(modules: Iterable[str]) -> str | None:
    """The command that installs what is missing of some modules of `EXTRAS`; None if all are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    extras = dict.fromkeys(EXTRAS[module][1] for module in missing)
    packages = ", ".join(EXTRAS[module][0] for module in missing)
    return f"pip install 'retnet-export[{','.join(extras)}]' (missing: {packages})"


def _gpu() -> tuple[dict[str, str], str | None]:
    """The GPU that CUDA sees, and if there is none, why."""
    from retnet_export.runtime.device import cuda

    try:
        if not cuda.device_count():
            return {}, (
                "no NVIDIA GPU that CUDA can use; if there is one, its driver is missing (nvidia-smi) or older than cuda-bindings "
                "(for a driver of CUDA 12, as on JetPack 6: pip install 'cuda-bindings<13')"
            )
        device, memory, (driver, _) = cuda.device(), cuda.memory_info(), cuda.versions()
    except UserError as error:
        return {}, str(error)
    except (cuda.CudaError, RuntimeError, OSError) as error:
        return {}, f"CUDA does not work here: {error}; restart, or install the driver again"
    return {
        "name": device.name,
        "compute capability": f"{device.compute_capability[0]}.{device.compute_capability[1]}",
        "memory": f"{memory.total / 2**30:.1f} GiB{' shared with the CPU' if device.integrated else ''}, "
        f"{memory.free / 2**30:.1f} GiB free",
        "CUDA": f"{driver // 1000}.{driver % 1000 // 10} (driver)",
    }, None


def _own_kernels(gpu: dict[str, str]) -> str | None:
    """Why the backend `cuda` cannot work; adds what compiles its kernels, and from where, to what is said of the GPU."""
    from retnet_export.runtime.backends.cuda import compiler
    from retnet_export.runtime.backends.cuda.backend import unavailable

    reason = unavailable()
    if reason is None:
        major, minor = compiler.compiler_version()
        gpu["NVRTC"] = f"{major}.{minor} ({compiler.library()})"
        gpu["compiled kernels"] = str(compiler.cache_folder())
    return reason


def _onnxruntime_cuda() -> str | None:
    mend = "pip install 'retnet-export[cuda]' (on a Jetson: NVIDIA's onnxruntime-gpu wheel for its JetPack)"
    try:
        import onnxruntime
    except ImportError:
        return mend
    providers = onnxruntime.get_available_providers()
    return None if "CUDAExecutionProvider" in providers else f"{mend}; this build has {', '.join(providers)}"


def _tensorrt(target: str) -> tuple[str | None, str | None]:
    """The version of TensorRT, and if it is not usable, why and what to do."""
    from retnet_export.runtime.backends.tensorrt_api import load_module

    try:
        return str(load_module(target).__version__), None
    except UserError as error:
        return None, str(error)


def _unsupported(target: str, gpu: dict[str, str]) -> str | None:
    from retnet_export.runtime.backends.tensorrt_api import TARGETS

    known = TARGETS[target].capabilities
    if known is None or gpu.get("compute capability") in known:
        return None
    return f"{target} has no kernels for compute capability {gpu.get('compute capability')}, only for {', '.join(known)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    return _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown"


def _memory() -> str:
    total, available = _field("/proc/meminfo", "MemTotal"), _field("/proc/meminfo", "MemAvailable")
    if total is None or available is None:
        return "unknown"
    return f"{int(total.split()[0]) / 2**20:.1f} GiB, {int(available.split()[0]) / 2**20:.1f} GiB available"


def available_memory() -> int | None:
    """Bytes that programs may still take, as the system estimates; None where it does not say."""
    available = _field("/proc/meminfo", "MemAvailable")
    return None if available is None else int(available.split()[0]) * 1024


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
