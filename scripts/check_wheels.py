"""Whether a Jetson can install the runtime: every requirement must resolve to a wheel for its Python and its glibc.

    python scripts/check_wheels.py [--extras cpu,cuda,serve]     prints the versions that pip would take, per JetPack

It asks the package index and installs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import parse_email
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class JetPack:
    """What pip sees of a JetPack: Python's and glibc's minor versions, and which builds fit its driver."""

    name: str
    python: str
    glibc: int
    driver: str


JETPACKS = (JetPack("6", "3.10", 35, "CUDA 12"), JetPack("7", "3.12", 39, "CUDA 13"))


def resolve(jetpack: JetPack, extra: str, pins: list[str]) -> dict[str, str] | str:
    """Versions by package; or pip's complaint."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(jetpack.glibc, 16, -1)] + ["manylinux2014_aarch64"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, ROOT], check=True, capture_output=True
        )
        (own,) = Path(scratch).glob("*.whl")
        line = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--target", scratch]
        line += ["--only-binary=:all:", "--implementation", "cp", "--python-version", jetpack.python]
        line += [argument for platform in platforms for argument in ("--platform", platform)]
        line += [*_requirements(own, jetpack, extra), *pins]
        run = subprocess.run([*line, "--report", report], capture_output=True, text=True)
        if run.returncode:
            complaints = [row for row in run.stderr.splitlines() if row.startswith("ERROR")]
            return complaints[-1] if complaints else run.stderr[-300:]
        found = json.loads(report.read_text())["install"]
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in found}


def _requirements(wheel: Path, jetpack: JetPack, extra: str) -> list[str]:
    """What a wheel of ours needs on that machine. pip would read the markers as this machine's."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared, _ = parse_email(archive.read(name))
    machine = {"platform_machine": "aarch64", "sys_platform": "linux", "python_version": jetpack.python, "extra": extra}
    machine["python_full_version"] = f"{jetpack.python}.12"
    needed = []
    for each in map(Requirement, declared.get("requires_dist", [])):
        if each.marker is None or each.marker.evaluate(machine):
            each.marker = None
            needed.append(str(each))
    return needed


def main() -> int:
    """Print a table; exit 1 if something has no wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=["cpu", "cuda", "serve"], help="each is resolved by itself")
    given = parser.parse_args()
    failed = False
    for jetpack in JETPACKS:
        for extra in given.extras:
            pins = ["cuda-bindings<13"] if extra == "cuda" and jetpack.driver == "CUDA 12" else []
            found = resolve(jetpack, extra, pins)
            title = f"JetPack {jetpack.name}, Python {jetpack.python}, glibc 2.{jetpack.glibc}, [{extra}]"
            if isinstance(found, str):
                failed = True
                print(f"{title}: no wheel\n    {found}")
            else:
                print(
                    f"{title}: {len(found)} wheels\n    "
                    + ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
