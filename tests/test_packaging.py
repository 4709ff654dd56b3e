"""The root folders are the package: what is installed must be what is here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import retnet_export

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = {"tests", "examples", "benchmarks", "docs", "scripts", "build", "dist"}


def listed_packages() -> set[str]:
    # tomllib is new in 3.11, and 3.10 is supported.
    block = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    return set(re.findall(r'"([\w.]+)"', block[1]))


def test_every_folder_with_an_init_file_is_listed_and_no_other():
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.glob("**/__init__.py")
        if not (NOT_PACKAGED & set(path.relative_to(ROOT).parts))
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert listed_packages() == {".".join(["retnet_export", *folder.parts]) for folder in folders}


def test_every_folder_with_python_files_is_a_package():
    for path in (ROOT / name for name in ("commands", "export", "graph", "runtime")):
        for folder in {file.parent for file in path.rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"{folder} would be missing from the wheel"


def test_only_the_entry_points_are_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_the_root_is_not_importable_as_bare_modules():
    # `import export` would make a second copy of every class, and isinstance would fail in strange places.
    assert str(ROOT) not in sys.path
    assert retnet_export.__name__ == "retnet_export"
