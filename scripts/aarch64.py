"""An aarch64 machine in a folder: Debian's Python 3.11 and aarch64 wheels, run by qemu's user emulation.

    python scripts/aarch64.py --onnxruntime 1.23.2 make .cache/aarch64     builds it, or keeps it if it is there already
    python scripts/aarch64.py run .cache/aarch64 inspect my.retnet                 runs `retnet-export` in it

It shows what a Jetson's processor would do, and nothing of its GPU. Needs `qemu-user` and apt (Debian or Ubuntu); no root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMULATOR = "qemu-aarch64"
DEBIAN = [
    "libbz2-1.0",
    "libc6",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "libgomp1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "libssl3",
    "libstdc++6",
    "libuuid1",
    "python3.11-minimal",
    "zlib1g",
]
PYTHON = "3.11"
EXTRAS = "cpu,serve"
"""Of the package. Their wheels have a folder of their own, so that other extras are downloaded again."""
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(35, 16, -1)] + ["manylinux2014_aarch64"]
"""Of wheels that run with glibc 2.35, JetPack 6's, newest first."""


def make(folder: Path, onnxruntime: str) -> None:
    """Unpack Debian's arm64 Python, the wheels that the runtime needs, and this package into `folder`.

    Args:
        folder: the machine; Debian's part is unpacked once, the wheels of one ONNX Runtime once, this package every time.
        onnxruntime: its version.
    """
    system, site = folder / "system", folder / f"site-{onnxruntime}"
    wheels = folder / f"wheels-{onnxruntime}-{EXTRAS.replace(',', '-')}"
    if not (system / "usr/bin" / f"python{PYTHON}").exists():
        _unpack_debian(system, folder / "debian")
    own = _own_wheel(folder / "own")
    if not wheels.exists():
        partial = wheels.with_name(f"{wheels.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
        version = ["--python-version", PYTHON, "--implementation", "cp"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *version, *platforms]
        subprocess.run([*command, "-d", partial, f"{own}[{EXTRAS}]", f"onnxruntime=={onnxruntime}"], check=True)
        partial.rename(wheels)
    shutil.rmtree(site, ignore_errors=True)
    for wheel in [*(path for path in sorted(wheels.glob("*.whl")) if path.name != own.name), own]:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def command(folder: Path, onnxruntime: str, *arguments: str | Path) -> list[str]:
    """The command line of the emulated Python."""
    python = folder / "system/usr/bin" / f"python{PYTHON}"
    settings = {"PYTHONPATH": folder / f"site-{onnxruntime}", "PYTHONNOUSERSITE": "1", "COLUMNS": "200"}
    given = [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    return [EMULATOR, "-L", str(folder / "system"), *given, str(python), *map(str, arguments)]


def _unpack_debian(system: Path, scratch: Path) -> None:
    for tool in (EMULATOR, "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: apt-get install qemu-user, on Debian or Ubuntu")
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "lists/partial").mkdir(parents=True, exist_ok=True)
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": "/dev/null",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *DEBIAN], cwd=scratch, check=True)
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, system], check=True)


def _own_wheel(folder: Path) -> Path:
    """This package as a wheel, built from the working tree."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnxruntime", default="1.23.2", help="its version; 1.23.2 is the newest for JetPack 6's Python")
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of retnet-export, for run")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder.absolute(), given.onnxruntime)
    else:
        line = command(given.folder.absolute(), given.onnxruntime, "-m", "retnet_export", *given.arguments)
        os.execvp(line[0], line)


if __name__ == "__main__":
    main()
