"""The commands on the bundled model, as a user runs them."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import EXAMPLE
from typer.testing import CliRunner

from retnet_export.cli import app


def run(*arguments: object, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def bundle(example_bundle, tmp_path):
    copy = tmp_path / "classics.retnet"
    shutil.copytree(example_bundle.path, copy)
    return copy


def test_export_says_what_it_made_as_one_json_document(tmp_path):
    document = json.loads(run("export", EXAMPLE, "-o", tmp_path / "out.retnet", "--json"))
    assert document["state_bytes_per_sequence"] == 5 * 4 * 64 * 128 * 4 + 8
    assert document["variants"]["portable"] == {"graphs": {"decode": "decode.onnx", "prefill": "prefill.onnx"}, "needs": None}
    assert document["variants"]["onnxruntime-cpu"]["needs"]["onnxruntime"] == "1.25"


def test_the_bundle_can_be_moved(bundle, tmp_path):
    moved = bundle.rename(tmp_path / "elsewhere.retnet")
    assert run("generate", moved, "--prompt", "In the", "--max-new-tokens", 4, "--temperature", 0).strip()


def test_generate_is_the_same_for_the_same_seed_and_reads_stdin(bundle):
    options = ("--max-new-tokens", 24, "--seed", 3)
    first = run("generate", bundle, "--prompt", "In the beginning", *options)
    assert first == run("generate", bundle, "--prompt", "In the beginning", *options)
    assert first == run("generate", bundle, *options, stdin="In the beginning")
    assert first != run("generate", bundle, "--prompt", "In the beginning", "--max-new-tokens", 24, "--seed", 4)


def test_generate_writes_english(bundle):
    text = run("generate", bundle, "--prompt", "And the LORD said unto", "--max-new-tokens", 60, "--temperature", 0)
    known = set(PASSAGE_WORDS.split())
    words = [word.strip(".,;:!?").lower() for word in text.split()]
    assert sum(word in known for word in words) > len(words) / 3, text


PASSAGE_WORDS = """the and of to in that he shall unto for i his a lord they be is him not them it with all thou thy was
god which my me said but ye their have as thee from this king son are were by when out you house land people came"""


def test_generate_ends_before_a_stop_string(bundle):
    text = run("generate", bundle, "--prompt", "KING HENRY.", "--temperature", 0, "--max-new-tokens", 80, "--stop", "\n")
    assert run("generate", bundle, "--prompt", "KING HENRY.", "--temperature", 0, "--max-new-tokens", 80).startswith(
        text.rstrip("\n")
    )
    assert "\n" not in text.rstrip("\n")


def test_verify_writes_its_result_into_the_manifest(bundle):
    printed = json.loads(run("verify", bundle, "--checkpoint", EXAMPLE, "--tokens", 64, "--json"))
    kept = json.loads((bundle / "manifest.json").read_text())["verification"]
    assert kept == printed
    assert kept["passed"] is True
    assert kept["agreements"] + kept["ties"] == 64
    assert "passed" in run("inspect", bundle)


def test_inspect_gives_the_manifest_and_the_engines_as_json(bundle):
    written = json.loads((bundle / "manifest.json").read_text())
    assert len(written.pop("sha256")) == 64  # the document's own
    assert json.loads(run("inspect", bundle, "--json")) == {**written, "parameters": 5_639_552, "engines": []}


def test_doctor_says_what_works():
    report = json.loads(run("doctor", "--json"))
    assert report["commands"]["export"] is None
    assert "backends" in run("doctor")


def test_help_needs_no_heavy_package():
    import subprocess
    import sys

    heavy = ("numpy", "rich", "torch", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "matplotlib", "huggingface_hub")
    script = f"""
import sys
from typer.testing import CliRunner
from retnet_export.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print([name for name in {heavy!r} if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
