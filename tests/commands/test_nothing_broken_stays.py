"""Weights that are not finite, and steps that fail late: a message names the tensor, and folders stay as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLE
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.commands.output import print_json
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError

TENSOR = "model.layers.2.mlp.down_proj.weight"


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def bundle(example_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(example_bundle.path, tmp_path / "classics.retnet"))


def with_value(checkpoint: Path, value: float, dtype: type = np.float32) -> Path:
    """The bundled checkpoint with one weight changed."""
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    tensors[TENSOR][3, 5] = value
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_weight_that_is_no_number_is_named_while_it_is_read(checkpoint, tmp_path, value, dtype):
    with_value(checkpoint, value, dtype)
    message = run("export", checkpoint, "-o", tmp_path / "out.retnet", code=1).stderr
    assert f"{TENSOR} holds {value} at [3, 5]" in message
    assert "export an earlier checkpoint" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_verify_against_such_a_checkpoint_leaves_the_good_bundle_as_it_was(bundle, checkpoint):
    before = listing(bundle)
    message = run("verify", bundle, "--checkpoint", with_value(checkpoint, np.nan), "--tokens", 8, code=1).stderr
    assert f"{TENSOR} holds nan at [3, 5]" in message
    assert listing(bundle) == before
    open_bundle(bundle)


def test_a_weight_beyond_float16_is_refused_with_a_precision_that_holds_it(checkpoint, tmp_path):
    with_value(checkpoint, 70_000)
    message = run("export", checkpoint, "-o", tmp_path / "half.retnet", "--precision", "fp16", code=1).stderr
    assert (
        "layers.2.ffn.down.weight holds 70000 at [3, 5], more than float16 can hold; export it with --precision fp32 or bf16"
        in message
    )
    assert not (tmp_path / "half.retnet").exists()
    run("export", checkpoint, "-o", tmp_path / "whole.retnet", "--precision", "fp32")
    run("export", checkpoint, "-o", tmp_path / "brain.retnet", "--precision", "bf16")


def test_a_manifest_takes_no_figure_that_is_not_finite(bundle):
    before = (bundle / "manifest.json").read_bytes()
    opened = open_bundle(bundle)
    with pytest.raises(UserError, match=r"verification\.error\.relative would be nan in its manifest, so nothing was recorded"):
        opened.with_manifest(verification={"passed": True, "error": {"relative": float("nan")}})
    with pytest.raises(UserError, match=r"quantization\.evaluation\.by_head\[1\] would be inf"):
        opened.with_manifest(quantization={"evaluation": {"by_head": (0.0, np.float64(np.inf))}})
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("force", [False, True])
def test_an_evaluation_that_fails_leaves_the_target_as_it_was(bundle, tmp_path, monkeypatch, force):
    target, text = tmp_path / "small.retnet", tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 30)
    if force:
        run("quantize", bundle, "-o", target, "--weights", "int8")
    before = listing(tmp_path)

    def fail(model, *arguments, **options):
        assert model.bundle.path != target
        raise UserError(f"{model.bundle.path}: its logits are not finite after token 3 of the text")

    monkeypatch.setattr("retnet_export.quantize.evaluation.evaluate", fail)
    options = ["--evaluate", text, *(["--force"] if force else [])]
    message = run("quantize", bundle, "-o", target, "--weights", "int4", *options, code=1).stderr
    assert f"{target}: its logits are not finite" in message
    assert listing(tmp_path) == before
    monkeypatch.undo()
    run("quantize", bundle, "-o", target, "--weights", "int4", "--evaluate", text, *(["--force"] if force else []))
    assert json.loads((target / "manifest.json").read_text())["quantization"]["evaluation"]["tokens"] > 128


def test_a_bundle_that_cannot_be_written_is_verified_all_the_same(bundle, monkeypatch):
    """The mount is read-only; root may write anywhere, so the system call stands in for it."""
    before = listing(bundle)

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("retnet_export.runtime.bundle.files.tempfile.mkstemp", read_only)
    result = run("verify", bundle, "--checkpoint", EXAMPLE, "--tokens", 8, "--json")
    assert json.loads(result.stdout)["passed"] is True
    assert "the result was not recorded in its manifest: Read-only file system" in result.stderr
    assert listing(bundle) == before


def test_json_has_null_for_a_value_that_is_not_a_number(capsys):
    print_json({"logprob": -np.inf, "top": [{"value": np.float64("nan")}, (1.5, None, "x")], "count": 3})
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {
        "logprob": None,
        "top": [{"value": None}, [1.5, None, "x"]],
        "count": 3,
    }
