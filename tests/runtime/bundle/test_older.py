"""A bundle of another format is refused with the commands that make it anew; they are real commands, and they do."""

import json
import shlex

import pytest
import tiny
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError


def aged(bundle, version=1, **changes):
    """The bundle as if another version had written it."""
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version} | changes))
    return bundle.path


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_bundle(path)
    return str(caught.value)


def test_the_command_makes_a_quantized_bundle_anew(tmp_path, checkpoint):
    options = ExportOptions(precision="fp16", state="fp16", chunk=32)
    exact = export_bundle(open_checkpoint(checkpoint), tmp_path / "old exact.retnet", options)
    before = quantize_bundle(exact, tmp_path / "old.retnet", QuantizeOptions("int4", 32))
    message = refusal(aged(before))
    assert "bundle format 1" in message
    commands = message.partition("make it again: ")[2].split(" and then ")
    assert len(commands) == 2
    for command in commands:
        arguments = shlex.split(command.replace("CHECKPOINT", str(checkpoint)))[1:]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    after = open_bundle(before.path).manifest
    assert (after.precision, after.graphs, after.state) == (
        before.manifest.precision,
        before.manifest.graphs,
        before.manifest.state,
    )
    assert after.files["weights.bin"] == before.manifest.files["weights.bin"]


def test_a_bundle_of_a_newer_version_asks_for_that_version(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config())
    assert "it comes from a newer version: pip install --upgrade retnet-export" in refusal(aged(bundle, version=1000))


@pytest.mark.parametrize("strange", [None, 7, [], {"weights": "; rm -rf /", "group_size": [], "chunk_size": "x"}])
def test_whatever_else_an_old_manifest_says_there_is_advice(tmp_path, strange):
    bundle = tiny.bundle(tmp_path, tiny.config())
    message = refusal(aged(bundle, precision=strange, graphs=strange, variants=strange, quantization=strange))
    assert "retnet-export export CHECKPOINT -o" in message
    assert "rm -rf" not in message
