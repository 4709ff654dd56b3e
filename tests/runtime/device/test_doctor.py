"""What `doctor` says of versions."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from retnet_export.commands.doctor import NEEDS, commands_that_work
from retnet_export.runtime.backends.onnxruntime_api import slow_when_quantized
from retnet_export.runtime.device.doctor import examine
from retnet_export.runtime.errors import EXTRAS


@pytest.mark.parametrize("version", ["1.20.1", "1.24.4", "1.24.0.dev20260101"])
def test_an_old_onnxruntime_is_slow_with_quantized_weights(version):
    assert f"ONNX Runtime {version} runs them with products of integers, a quarter slower" in str(slow_when_quantized(version))


@pytest.mark.parametrize("version", ["1.25.0", "1.32.0", "2.0", "not installed"])
def test_a_new_or_unknown_one_is_not_blamed(version):
    assert slow_when_quantized(version) is None


def test_the_report_has_a_line_for_it():
    assert "run quantized bundles fast on the CPU" in examine()["works"]


def test_every_command_has_a_row_and_no_other():
    from retnet_export.cli import app

    commands = typer.main.get_command(app).commands
    assert {use.partition(" ")[0] for use in NEEDS} == set(commands)
    assert commands_that_work(commands).keys() == NEEDS.keys()


def test_a_row_says_which_extra_brings_what_is_missing(monkeypatch):
    installed = importlib.util.find_spec
    absent = ("torch", "onnx_ir")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else installed(name))
    rows = commands_that_work(("verify", "generate", "export"))
    assert rows["verify"] == "pip install 'retnet-export[export,torch]' (missing: onnx-ir, torch)"
    assert rows["export"] == "pip install 'retnet-export[export]' (missing: onnx-ir)"
    assert rows["generate"] is None


def test_what_an_extra_brings_is_in_that_extra():
    """A message must not name an extra that would not help."""
    listed = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    extras = dict(re.findall(r"^([a-z-]+) = \[(.*?)\]$", listed.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    for package, extra in EXTRAS.values():
        assert f'"{package}' in extras[extra], (package, extra)
