"""Type-check our calls of TensorRT against the package tensorrt-stubs: python scripts/check_tensorrt_types.py

The stubs are generated, lack the marker that mypy looks for in installed packages, and version 10.13 has five signatures that are
not valid Python. So they are copied beside a link to the package, those five accept anything, and mypy checks both.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (
    "retnet_export.export.tensorrt",
    "retnet_export.export.tensorrt_network",
    "retnet_export.export.tensorrt_progress",
    "retnet_export.runtime.backends.tensorrt",
)


def repaired(text: str) -> str:
    """The stub with every definition that does not parse replaced by one that accepts anything."""
    lines = text.splitlines()
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            number = (error.lineno or 1) - 1
            line = lines[number]
            definition = re.match(r"(\s*def \w+)\(.*", line)
            if definition is None:
                raise
            lines[number] = f"{definition[1]}(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:"
        else:
            return "\n".join(lines)


def main() -> int:
    installed = Path(sysconfig.get_path("purelib"))
    if not (installed / "tensorrt_bindings" / "tensorrt.pyi").exists():
        print("tensorrt-stubs is not installed: pip install --no-deps tensorrt-stubs==10.13.0.35.1")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in ("tensorrt", "tensorrt_bindings"):
            shutil.copytree(installed / package, folder / package)
        stub = folder / "tensorrt_bindings" / "tensorrt.pyi"
        stub.write_text(repaired(stub.read_text()))
        (folder / "retnet_export").symlink_to(ROOT)
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".cache" / "mypy-tensorrt")]
        modules = [option for module in CHECKED for option in ("-m", module)]
        command = [sys.executable, "-m", "mypy", *options, *modules]
        result = subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": "."}, capture_output=True, text=True)
    # The generated stubs have faults of their own that are no concern of ours.
    ours = [line for line in result.stdout.splitlines() if line.startswith("retnet_export/")]
    print("\n".join(ours) or f"{', '.join(CHECKED)}: every call fits the stubs")
    if not ours and result.returncode not in (0, 1):
        print(result.stdout, result.stderr, sep="\n")
    return int(bool(ours) or result.returncode not in (0, 1))


if __name__ == "__main__":
    sys.exit(main())
