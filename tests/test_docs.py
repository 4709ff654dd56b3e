"""What pages and code name exists: files of the repository, options of the commands, targets of the Makefile."""

from __future__ import annotations

import re

import pytest
import typer
from conftest import ROOT

from retnet_export.cli import app

PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "cli.md")]
FOLDERS = "benchmarks|commands|compare|docs|examples|export|graph|plan|quantize|runtime|scripts|serve|tests"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w\.(?:py|cu|cuh|sh|md)\b")
EXTERNAL = {"examples/fairseq/models/retnet.py", "docs/reference/cli.md"}
"""A file of another project, and a page that `make docs` writes."""


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def text(request):
    return request.param.read_text(encoding="utf-8")


def test_files_of_the_repository_exist(text):
    assert {name for name in set(FILE.findall(text)) - EXTERNAL if not (ROOT / name).exists()} == set()


def test_files_that_code_names_exist():
    """From the root, or from the folder of the tests."""
    sources = [
        path for folder in FOLDERS.split("|") for end in ("py", "cu", "cuh", "sh") for path in (ROOT / folder).rglob(f"*.{end}")
    ]
    assert sources
    named = {(str(path.relative_to(ROOT)), name) for path in sources for name in FILE.findall(path.read_text(encoding="utf-8"))}
    here = (ROOT, ROOT / "tests")
    assert {each for each in named if each[1] not in EXTERNAL and not any((root / each[1]).exists() for root in here)} == set()


def test_targets_of_the_makefile_exist(text):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)|^make ([a-z0-9-]+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def test_options_of_commands_exist(text):
    commands = typer.main.get_command(app).commands
    # A command may go on in the next line.
    for line in re.findall(r"retnet-export ((?:[^\n`#|]|\\\n)+)", text):
        name, *words = line.split()
        if name in commands:
            known = {option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
            given = {word.partition("=")[0].strip("[]'\",;.)") for word in words if word.startswith("-") and len(word) > 1}
            assert {option for option in given if re.fullmatch(r"-\w|--[\w-]+", option)} <= known | {"-h", "--help"}, line
