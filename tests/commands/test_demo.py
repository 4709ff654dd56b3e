"""`demo` walks the whole path, and weighs the quantized bundles against the float one on a text they never saw."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.export.verify import PASSAGE


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The demo as a user runs it: its steps are processes of their own, which write where it writes."""
    command = [sys.executable, "-m", "retnet_export", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def columns_of(row: str, printed: str) -> list[float]:
    """The figures of a row of the table, from left to right."""
    line = next(line for line in printed.splitlines() if line.startswith(f"{row}  "))
    return [float(cell.replace(",", "")) for cell in re.findall(r"[\d.,]+(?:e-\d+)?", line.removeprefix(row))]


@pytest.mark.slow
def test_the_demo_runs_the_whole_path_and_says_what_quantizing_cost_and_brought(tmp_path):
    (tmp_path / "passage.txt").write_text(PASSAGE, encoding="utf-8")
    result = run("-o", tmp_path / "demo.retnet", "--text", tmp_path / "passage.txt", "--calibration", tmp_path / "passage.txt")
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "verified against the parallel form" in printed
    assert "decoding, one sequence" in printed
    for name in ("demo", "demo-int8", "demo-int4"):
        assert (tmp_path / f"{name}.retnet" / "manifest.json").is_file()
    fp32, int8, int4 = (columns_of(row, printed) for row in ("fp32", "INT8", "INT4, gptq"))
    for megabytes, tokens_per_second, token_ms, *_ in (fp32, int8, int4):
        assert tokens_per_second == pytest.approx(1e3 / token_ms, rel=0.02)
        assert megabytes > 0
    assert fp32[0] > 3 * int8[0] > 3 * int4[0]
    assert int8[3] == pytest.approx(fp32[3], rel=0.01)  # perplexity
    assert int4[4] == pytest.approx(fp32[4], rel=0.03)  # bits per byte
    assert fp32[5:] == [0, 100]
    assert 0 < int8[5] < int4[5] < 0.05  # KL
    assert 100 > int8[6] > int4[6] > 80  # same best token
    assert_the_printed_commands_are_those_that_ran(printed, result.stderr, tmp_path)


def assert_the_printed_commands_are_those_that_ran(printed: str, errors: str, folder: Path) -> None:
    """Run again by hand, a printed `generate` gives the text that stands below it, in no more memory than it said."""
    lines = printed.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ retnet-export ")]
    assert [shlex.split(command)[1] for command in commands] == [
        *("export", "verify", "generate", "quantize", "quantize", "generate", "compile", "compare")
    ]
    # The engines were built later; looking at one imports TensorRT, which takes memory.
    shutil.rmtree(folder / "demo.retnet" / "engines", ignore_errors=True)
    generate = shlex.split(commands[2])
    again = subprocess.run([sys.executable, "-m", "retnet_export", *generate[1:]], capture_output=True, text=True, check=True)
    start = lines.index(f"$ {commands[2]}") + 1
    text = again.stdout.splitlines()
    assert lines[start : start + len(text)] == text
    peaks = [float(figure) for figure in re.findall(r"peak memory +([\d.]+) MB", errors)]
    (peak,) = (float(figure) for figure in re.findall(r"peak memory +([\d.]+) MB", again.stderr))
    assert peaks[0] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("option", ["--text", "--calibration"])
def test_a_text_that_is_not_there_is_refused_before_anything_is_made(tmp_path, option):
    result = run("-o", tmp_path / "demo.retnet", option, tmp_path / "absent.txt")
    assert result.returncode == 1
    assert "absent.txt: cannot be read: No such file or directory" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_is_refused_before_anything_is_quantized(tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning")
    result = run("-o", tmp_path / "demo.retnet", "--text", tmp_path / "short.txt")
    assert result.returncode == 1
    assert "shorter than one chunk of 128" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.retnet", "short.txt"]


def test_an_installed_package_without_the_excerpt_asks_for_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr("retnet_export.commands.demo.HELD_OUT", tmp_path / "absent.txt")
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo.retnet"), "--checkpoint", str(EXAMPLE)])
    assert result.exit_code == 1
    assert "not in the installed package: give --text FILE" in result.stderr
    assert list(tmp_path.iterdir()) == []
