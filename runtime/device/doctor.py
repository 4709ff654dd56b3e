"""What this machine has, what works on it, and the one command that would mend what does not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from retnet_export.runtime.backends import MODULES, registered
from retnet_export.runtime.device import jetson
from retnet_export.runtime.errors import UserError

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
    gpu, works = _gpu(), dict[str, str | None]()
    for name in MODULES:
        backend = registered(name)
        works |= {purpose: why_not() for purpose, why_not in backend.purposes.items()}
        gpu |= backend.facts()
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


def _gpu() -> dict[str, str]:
    """The GPU that CUDA sees."""
    from retnet_export.runtime.device import cuda

    if cuda.unavailable() is not None:
        return {}
    try:
        device, memory, (driver, _) = cuda.device(), cuda.memory_info(), cuda.versions()
    except (UserError, RuntimeError) as error:
        return {"CUDA": f"does not work here: {error}"}
    return {
        "name": device.name,
        "compute capability": f"{device.compute_capability[0]}.{device.compute_capability[1]}",
        "memory": f"{memory.total / 2**30:.1f} GiB{' shared with the CPU' if device.integrated else ''}, "
        f"{memory.free / 2**30:.1f} GiB free",
        "CUDA": f"{driver // 1000}.{driver % 1000 // 10} (driver)",
    }


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
