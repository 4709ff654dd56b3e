"""The machine that is measured on: its cores, its memory, and what a report must say of it."""

from __future__ import annotations

import datetime
import os

from retnet_export.runtime.device.doctor import examine, package_versions

PACKAGES = ("retnet-export", "onnxruntime", "onnxruntime-genai", "numpy")


def cores(threads: int | None) -> tuple[int, ...]:
    """The cores to pin to: one a thread, or all that this process may use; never more threads than cores are measured."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return tuple(usable[:threads])


def description(pinned: tuple[int, ...]) -> dict[str, str]:
    """Processor, cores in use, memory, system, date."""
    seen = examine()["machine"]
    return {
        "processor": seen["processor"],
        "cores": f"{len(pinned)} of {seen['cores']}, pinned",
        "memory": seen["memory"],
        "system": seen["system"],
        "python": seen["python"],
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Versions of what runs."""
    return package_versions(*PACKAGES)
