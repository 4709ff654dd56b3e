"""What this machine has, what works on it, and the one command that would mend what does not."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

PURPOSES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "generate on the CPU (onnxruntime)": (("onnxruntime", "numpy", "tokenizers"), "cpu"),
    "export safetensors checkpoints": (("onnx", "onnx_ir", "ml_dtypes", "safetensors"), "export"),
    "compare with a Transformer": (("matplotlib", "onnx_ir", "onnxruntime"), "compare"),
    "verify against the parallel form": (("torch",), "torch"),
}
"""What users want to do, the modules it needs, and the extra that brings them."""

DISTRIBUTIONS = ("retnet-export", "numpy", "onnxruntime", "onnx", "onnx-ir", "torch", "tokenizers", "safetensors")


class Report(TypedDict):
    """What `doctor --json` prints; `works` maps a purpose to None, or to what would make it work."""

    machine: dict[str, str]
    packages: dict[str, str]
    works: dict[str, str | None]


def examine() -> Report:
    """Look at the machine; never raises because something is missing or unknown."""
    works: dict[str, str | None] = {}
    for purpose, (modules, extra) in PURPOSES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        works[purpose] = f"pip install 'retnet-export[{extra}]' (missing: {', '.join(missing)})" if missing else None
    return Report(
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
