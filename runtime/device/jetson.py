"""What a Jetson says of itself: the texts of its files and tools, read into values; and the power it draws.

Rule: a text that is not understood gives None, never an error: boards and releases differ, and a new one must not break
`doctor`. The parsers are tested on texts of real boards (tests/runtime/device/test_jetson.py names board, release and source).
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

RELEASE, MODEL = Path("/etc/nv_tegra_release"), Path("/proc/device-tree/model")
HWMON = Path("/sys/class/hwmon")

JETPACKS: Sequence[tuple[tuple[int, int], str]] = (
    ((39, 0), "7.2"),
    ((38, 4), "7.1"),
    ((38, 2), "7.0"),
    ((36, 4), "6.1 or 6.2"),
    ((36, 3), "6.0"),
    ((36, 2), "6.0 preview"),
    ((35, 0), "5"),
    ((32, 0), "4"),
)
"""The JetPack of each L4T release, newest first: a release belongs to the first row that is not above it."""

TOTAL_RAILS: Sequence[tuple[str, ...]] = (
    ("VIN",),  # AGX Thor
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX, TX2
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin has no rail for all
    ("POM_5V_IN",),  # Nano
)
"""The rails that add up to a module's power, by board; the first set that is complete counts."""


def l4t_version(text: str) -> str | None:
    """Of /etc/nv_tegra_release: "36.4.3"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return None if found is None else f"{found[1]}.{found[2]}"


def jetpack_of(l4t: str) -> str | None:
    """The JetPack that an L4T release belongs to; None for one that is older than the table."""
    numbers = tuple(int(part) for part in l4t.split(".")[:2] if part.isdigit())
    return next((jetpack for floor, jetpack in JETPACKS if numbers >= floor), None)


def power_mode(text: str) -> str | None:
    """Of `nvpmodel -q`: "MAXN_SUPER"."""
    found = re.search(r"NV Power Mode: *(\S+)", text)
    return None if found is None else found[1]


def total_power_mw(rails: Mapping[str, int]) -> int | None:
    """The module's power; None if its rails are not among those we know."""
    for names in TOTAL_RAILS:
        if all(name in rails for name in names):
            return sum(rails[name] for name in names)
    return None


def read_rails(root: Path = HWMON) -> dict[str, int]:
    """Power of each labelled rail in milliwatts, from the INA sensors that Linux shows; empty where there are none."""
    rails: dict[str, int] = {}
    for label in sorted(root.glob("hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        try:
            millivolts = int((label.parent / f"in{channel}_input").read_text())
            milliamperes = int((label.parent / f"curr{channel}_input").read_text())
            rails[label.read_text().strip()] = millivolts * milliamperes // 1000
        except (OSError, ValueError):
            continue  # a rail without a current sensor
    return rails


class PowerMeter:
    """Adds up the module's energy while its block runs, from the rails, ten times a second.

    Attributes:
        joules: so far; None where there are no rails that we know.
    """

    def __init__(self, root: Path = HWMON, interval_s: float = 0.1) -> None:
        self._root, self._interval_s = root, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="power-meter", daemon=True)
        self.joules: float | None = None

    def __enter__(self) -> PowerMeter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _measure(self) -> None:
        before, watts_before = time.perf_counter(), self._watts()
        if watts_before is None:
            return
        self.joules = 0.0
        last = False
        while not last:
            last = self._stopped.wait(self._interval_s)
            now, watts = time.perf_counter(), self._watts()
            if watts is None:
                continue
            self.joules += (now - before) * (watts + watts_before) / 2
            before, watts_before = now, watts

    def _watts(self) -> float | None:
        total = total_power_mw(read_rails(self._root))
        return None if total is None else total / 1e3


def describe() -> dict[str, str]:
    """What `doctor` says of a Jetson; empty elsewhere."""
    release = _text(RELEASE)
    if release is None:
        return {}
    l4t = l4t_version(release)
    facts = {
        "board": (_text(MODEL) or "unknown").strip("\0\n "),
        "L4T": l4t or "unknown",
        "JetPack": (None if l4t is None else jetpack_of(l4t)) or "unknown",
        "power mode": power_mode(_output("nvpmodel", "-q")) or "unknown (nvpmodel -q)",
    }
    rails = read_rails()
    if (total := total_power_mw(rails)) is not None:
        facts["power"] = f"{total / 1e3:.1f} W ({', '.join(rails)})"
    return facts


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
