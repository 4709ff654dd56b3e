"""`quantize` and `evaluate` refuse unusable texts with one message and leave no half bundle."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.export.verify import PASSAGE

TARGET = "small.retnet"


@pytest.fixture
def bundle(example_bundle) -> Path:
    return example_bundle.path


@pytest.fixture(scope="module")
def without_fallback(tmp_path_factory) -> Path:
    """The bundled model with a tokenizer that knows only the characters of its vocabulary."""
    folder = tmp_path_factory.mktemp("without fallback")
    shutil.copytree(EXAMPLE, folder / "checkpoint")
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"] |= {"byte_fallback": False, "unk_token": "<0x00>"}
    (folder / "checkpoint" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return export_bundle(open_checkpoint(folder / "checkpoint"), folder / "letters.retnet").path


def refused(folder: Path, *arguments: object, code: int = 1) -> str:
    """Run a command, which must refuse and leave its folder as it is: the message."""
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "error: " in result.stderr.lower()
    assert "Traceback" not in result.stderr
    assert sorted(folder.iterdir()) == before
    return result.stderr


def uses(bundle: Path, text: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    """The three commands that read a text."""
    quantize = ("quantize", bundle, "-o", folder / TARGET)
    return {
        "calibration": (*quantize, "--method", "gptq", "--calibration", text),
        "evaluation": (*quantize, "--evaluate", text),
        "text": ("evaluate", bundle, "--text", text),
    }


USES = ("calibration", "evaluation", "text")


@pytest.mark.parametrize("use", USES)
def test_a_folder_is_no_text(bundle, tmp_path, use):
    assert f"{tmp_path}: a folder, expected a text file" in refused(tmp_path, *uses(bundle, tmp_path, tmp_path)[use])


@pytest.mark.parametrize("use", USES)
def test_a_blank_text_is_called_blank(bundle, tmp_path, use):
    text = tmp_path / "blank.txt"
    text.write_text(" \n\n\t" * 100)
    assert f"{text}: blank; give a text" in refused(tmp_path, *uses(bundle, text, tmp_path)[use])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("copies", [1, 60])
def test_a_character_that_the_tokenizer_does_not_know_is_found_by_file_and_line(without_fallback, tmp_path, use, copies):
    text = tmp_path / "text.txt"
    known = PASSAGE.rstrip("\n") + "\n"
    # At the end, where the last of the passages that calibration reads of a long text is.
    text.write_text(known * copies + "the 日本\n", encoding="utf-8")
    line = known.count("\n") * copies + 1
    message = refused(tmp_path, *uses(without_fallback, text, tmp_path)[use])
    assert f"{text}: line {line}: {without_fallback} has a tokenizer that does not know '日'" in message


def test_a_long_blank_stretch_is_found_by_its_line(bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(PASSAGE * 2 + "\n" * 120_000, encoding="utf-8")
    assert "blank from line " in refused(tmp_path, *uses(bundle, text, tmp_path)["calibration"])


def test_an_output_below_a_file_names_the_file(bundle, tmp_path):
    (tmp_path / "file").touch()
    message = refused(tmp_path, "quantize", bundle, "-o", tmp_path / "file" / "deep" / TARGET)
    assert f"cannot be written: {tmp_path / 'file'} is not a folder; choose another place" in message


def test_a_full_disk_leaves_nothing(bundle, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        message = refused(tmp_path, "quantize", bundle, "-o", tmp_path / TARGET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / TARGET}: cannot be written: File too large; nothing was kept" in message


def test_ctrl_c_leaves_nothing(bundle, tmp_path):
    (tmp_path / "text.txt").write_text(PASSAGE, encoding="utf-8")
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that a shell started in the background ignores it
from retnet_export.cli import app
from retnet_export.quantize import matrices
real = matrices.gptq
def gptq(*arguments):
    print("at work", flush=True)
    return real(*arguments)
matrices.gptq = gptq
app()
"""
    arguments = [str(argument) for argument in uses(bundle, tmp_path / "text.txt", tmp_path)["calibration"]]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "at work\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_choice_that_is_none_is_answered_with_the_choices(bundle, tmp_path):
    message = refused(tmp_path, "quantize", bundle, "-o", tmp_path / TARGET, "--method", "foo", code=2)
    assert "'foo' is not one of 'rtn', 'gptq'" in message
    message = refused(tmp_path, "quantize", bundle, "-o", tmp_path / TARGET, "--group-size", 48, code=2)
    assert "--group-size is 48, expected 16, 32, 64, 128 or 256" in message


def test_logits_that_are_not_finite_are_refused_with_the_token(bundle, tmp_path):
    (tmp_path / "text.txt").write_text(PASSAGE, encoding="utf-8")
    broken = tmp_path / "broken.retnet"
    shutil.copytree(bundle, broken)
    weights = (broken / "weights.bin").stat().st_size
    (broken / "weights.bin").write_bytes(b"\xff" * weights)
    from retnet_export.quantize.evaluation import evaluate
    from retnet_export.runtime.errors import UserError
    from retnet_export.runtime.model import load

    with pytest.raises(UserError, match=r"broken\.retnet: its logits are not finite after token 1 of the text; if the bundle is"):
        evaluate(load(broken, check_hashes=False), tmp_path / "text.txt", tokens=128)
