"""The machine's memory, as Linux states it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def meminfo() -> Mapping[str, int]:
    """Bytes by the names of /proc/meminfo: "MemTotal", "MemAvailable", "SwapFree", …; empty where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, _, value in fields if value.endswith(" kB")}


def available_memory() -> int | None:
    """Bytes that programs may still take without swapping, as the system estimates; None where it does not say."""
    return meminfo().get("MemAvailable")
