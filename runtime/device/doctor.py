"""What this machine has, what works on it, and the command that fixes what does not."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from retnet_export.runtime.backends import MODULES, registered
from retnet_export.runtime.device import jetson
from retnet_export.runtime.device.memory import meminfo
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
        packages=dict.fromkeys(DISTRIBUTIONS, "not installed") | package_versions(*DISTRIBUTIONS),
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


def package_versions(*names: str) -> dict[str, str]:
    """Versions of installed packages; a package that is not installed is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory() -> str:
    fields = meminfo()
    if not {"MemTotal", "MemAvailable"} <= fields.keys():
        return "unknown"
    return f"{fields['MemTotal'] / 2**30:.1f} GiB, {fields['MemAvailable'] / 2**30:.1f} GiB available"
