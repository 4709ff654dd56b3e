"""`retnet-export compare`: a table, a report, and one message for a mistake."""

from __future__ import annotations

import json

import pytest
import tiny
from typer.testing import CliRunner

from retnet_export.cli import app

QUICK = ("--contexts", "0", "--prompts", "4", "--batches", "", "--seconds", "0.05", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.bundle(tmp_path_factory.mktemp("bundle"), tiny.CONFIGS["fla"]).path


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


def test_the_table_ends_with_what_it_means_and_where_the_report_lies(bundle, tmp_path):
    result = invoke(bundle, "-o", tmp_path / "report", *QUICK)
    assert result.exit_code == 0, result.output
    assert "The RetNet takes" in result.stdout
    assert result.stdout.rstrip().endswith(f"report: {tmp_path / 'report' / 'report.html'}")
    assert {"report.html", "report.json", "prefill.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_json_is_one_document_and_the_same_as_the_file(bundle, tmp_path):
    result = invoke(bundle, "-o", tmp_path / "report", "--json", *QUICK)
    assert json.loads(result.stdout) == json.loads((tmp_path / "report" / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", "0,-5"), "--contexts holds -5, expected 0 to 1,048,576"),
        (("--contexts", "long"), "--contexts is 'long', expected integers separated by commas"),
        (("--batches", "0"), "--batches holds 0, expected 1 to 1,048,576"),
        (("--memory-budget", "-1"), "--memory-budget is -1, expected gigabytes, more than 0"),
        (("--memory-budget", "0.00001"), "give a larger budget, or quantize the bundle"),
        (("--kv-heads", "3"), "--kv-heads is 3, expected a divisor of the baseline's 1 query heads: 1"),
        (("--peer", "vllm"), "--peer is 'vllm', expected onnxruntime-genai or llama.cpp"),
        (("--text", "absent.txt"), "absent.txt"),
    ],
)
def test_a_mistake_is_refused_with_a_message_and_leaves_nothing(bundle, tmp_path, arguments, message):
    result = invoke(bundle, "-o", tmp_path / "report", *arguments)
    assert result.exit_code == (2 if message.startswith("--") else 1)  # a flag at fault is wrong usage
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(bundle, tmp_path):
    (tmp_path / "file").touch()
    result = invoke(bundle, "-o", tmp_path / "file" / "report")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_an_existing_report_is_kept_unless_force_is_given(bundle, tmp_path):
    (tmp_path / "report").mkdir()
    result = invoke(bundle, "-o", tmp_path / "report", *QUICK)
    assert result.exit_code == 1
    assert "exists already" in result.stderr
