"""A user's mistake gets one message that says what, where and what to do; exit code 1; nothing left behind."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest
from conftest import EXAMPLE, ROOT, edit_json
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.runtime.bundle import bundle as bundles
from retnet_export.runtime.errors import UserError


def refused(*arguments: object) -> str:
    """Run the command line, which must refuse: the message, on one logical line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def misused(*arguments: object) -> str:
    """Run the command line, which must find a flag at fault: the message."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def refused_export(checkpoint, tmp_path) -> str:
    """Export must refuse and leave nothing beside the checkpoint."""
    before = sorted(path.name for path in tmp_path.iterdir())
    message = refused("export", checkpoint, "-o", tmp_path / "out.retnet")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return message


def test_no_checkpoint_there(tmp_path):
    assert "no such file or folder" in refused_export(tmp_path / "absent", tmp_path)


def test_no_weights(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    message = refused_export(checkpoint, tmp_path)
    assert "model.safetensors" in message
    assert str(checkpoint) in message


def test_truncated_weights(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused_export(checkpoint, tmp_path)
    assert f"{weights}: not a complete safetensors file" in message
    assert "truncated" in message


def test_weights_that_are_no_safetensors_at_all(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").write_bytes(b"not tensors")
    assert "not a complete safetensors file" in refused_export(checkpoint, tmp_path)


def test_a_config_that_is_not_json(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{not json")
    assert f"{checkpoint / 'config.json'}: not valid JSON" in refused_export(checkpoint, tmp_path)


def test_a_config_that_is_a_list(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("[]")
    assert "expected a JSON object, found a list" in refused_export(checkpoint, tmp_path)


def test_no_config(checkpoint, tmp_path):
    (checkpoint / "config.json").unlink()
    assert "no config.json" in refused_export(checkpoint, tmp_path)


@pytest.mark.parametrize("field", ["hidden_size", "num_heads", "num_hidden_layers", "vocab_size"])
def test_a_config_without_a_field(checkpoint, tmp_path, field):
    edit_json(checkpoint / "config.json", **{field: ...})
    assert f"the field '{field}' is missing" in refused_export(checkpoint, tmp_path)


def test_a_config_with_a_field_of_the_wrong_type(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", hidden_size="256")
    assert "hidden_size is '256', expected a whole number" in refused_export(checkpoint, tmp_path)


def test_another_model_type(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", model_type="llama")
    message = refused_export(checkpoint, tmp_path)
    assert "model_type is 'llama'" in message
    assert "retnet" in message


def test_weights_of_another_shape(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", intermediate_size=768)
    message = refused_export(checkpoint, tmp_path)
    assert "shapes do not match its settings" in message
    assert "model.layers.0.mlp.gate_proj.weight is [512, 256], expected [768, 256]" in message


def test_more_layers_than_weights(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", num_hidden_layers=6)
    message = refused_export(checkpoint, tmp_path)
    assert "missing: model.layers.5." in message


def test_fewer_layers_than_weights(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", num_hidden_layers=4)
    assert "not used: model.layers.4.attn" in refused_export(checkpoint, tmp_path)


def test_a_precision_that_is_none(checkpoint, tmp_path):
    message = misused("export", checkpoint, "-o", tmp_path / "out.retnet", "--precision", "fp8")
    assert "'--precision': " in message
    assert "'fp8' is not one of 'fp32', 'fp16', 'bf16'" in message


def test_an_output_that_exists_stays_unless_forced(example_bundle, tmp_path):
    target = tmp_path / "out.retnet"
    shutil.copytree(example_bundle.path, target)
    (target / "mine.txt").write_text("kept")
    assert f"{target}: exists already" in refused("export", EXAMPLE, "-o", target)
    assert (target / "mine.txt").read_text() == "kept"
    assert CliRunner().invoke(app, ["export", str(EXAMPLE), "-o", str(target), "--force"]).exit_code == 0
    assert not (target / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.retnet"]


def test_force_does_not_delete_a_folder_that_is_no_bundle(tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.tex").write_text("years of work")
    message = refused("export", EXAMPLE, "-o", target, "--force")
    assert "is not a bundle, so --force does not replace it" in message
    assert (target / "chapter1.tex").exists()


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("export", EXAMPLE, "-o", tmp_path / "file" / "out.retnet")


def test_an_empty_prompt(example_bundle):
    assert "the prompt is empty" in refused("generate", example_bundle.path, "--prompt", "")


def test_characters_the_tokenizer_never_saw_go_through_as_bytes(example_bundle):
    # The bundled tokenizer falls back to bytes, so any prompt is fine.
    result = CliRunner().invoke(app, ["generate", str(example_bundle.path), "--prompt", "日本 🙂", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output


def test_characters_that_a_tokenizer_without_byte_fallback_does_not_know(checkpoint, tmp_path):
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = False
    tokenizer["model"]["unk_token"] = "<0x00>"
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert CliRunner().invoke(app, ["export", str(checkpoint), "-o", str(tmp_path / "b.retnet")]).exit_code == 0
    message = refused("generate", tmp_path / "b.retnet", "--prompt", "the 日")
    assert "the tokenizer does not know '日' (character 4 of the text)" in message


def test_sampling_options_out_of_range(example_bundle):
    assert "--top-p is 1.5, expected more than 0" in misused("generate", example_bundle.path, "--prompt", "a", "--top-p", "1.5")
    assert "--temperature is -1.0" in misused("generate", example_bundle.path, "--prompt", "a", "--temperature", "-1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a", "--stop-token", "99999"), "--stop-token has 99999, which is not in the vocabulary of 4096"),
        (("--prompt", "a", "--stop-token", "-1"), "--stop-token has -1"),
        (("--prompt", "a", "--logit-bias", "4096=1"), "--logit-bias names token 4096"),
        (("--prompt", "a", "--stop", ""), "--stop has an empty text"),
        (("--prompt", "a", "--logprobs", "2"), "--logprobs needs --json or --prompts"),
        (("--prompt", "a", "--prompt-ids", "1"), "--prompt-ids cannot be combined with --prompt"),
        (("--prompt", "a", "--prompts", "p.txt"), "--prompts cannot be combined with --prompt: give one of them"),
        (("--prompt-ids", "1 x"), "--prompt-ids is '1 x', expected token ids"),
        (("--prompts", "p.txt", "--save-state", "s"), "--save-state cannot be combined with --prompts"),
        (("--prompts", "p.txt", "--ids"), "--ids cannot be combined with --prompts"),
    ],
)
def test_options_that_would_do_nothing_are_refused(example_bundle, options, message):
    assert message in misused("generate", example_bundle.path, *options)


def test_a_bundle_that_is_not_there(tmp_path):
    assert "no such bundle" in refused("generate", tmp_path / "absent.retnet", "--prompt", "a")
    assert "not a bundle, it has no manifest.json" in refused("inspect", tmp_path)


def test_a_damaged_bundle(example_bundle, tmp_path):
    damaged = tmp_path / "damaged.retnet"
    shutil.copytree(example_bundle.path, damaged)
    weights = bytearray((damaged / "weights.bin").read_bytes())
    weights[12345] ^= 1
    (damaged / "weights.bin").write_bytes(weights)
    assert "weights.bin: its SHA-256 does not match the manifest" in refused("inspect", damaged)


def test_an_unknown_backend(example_bundle):
    message = misused("generate", example_bundle.path, "--prompt", "a", "--backend", "cudnn")
    assert "'cudnn' is not one of 'auto', 'cuda'" in message


def test_wrong_usage_is_exit_code_2():
    assert CliRunner().invoke(app, ["export"]).exit_code == 2
    assert CliRunner().invoke(app, ["export", "--no-such-option"]).exit_code == 2


def test_export_warns_that_bfloat16_is_for_gpus_and_a_cpu_refuses_it_with_what_works(tmp_path):
    target = tmp_path / "brain.retnet"
    result = CliRunner().invoke(app, ["export", str(EXAMPLE), "-o", str(target), "--precision", "bf16"])
    assert result.exit_code == 0
    assert "warning: --precision bf16: ONNX Runtime has no kernels for it on a CPU" in result.stderr
    for command in (
        ("generate", target, "--prompt", "In", "--backend", "onnxruntime"),
        ("verify", target, "--checkpoint", EXAMPLE, "--by-layer"),
        ("evaluate", target, "--text", EXAMPLE / "held-out.txt", "--backend", "onnxruntime"),
    ):
        message = refused(*command)
        assert f"{target}: its products are bfloat16, which ONNX Runtime does not compute on a CPU" in message
        assert "--backend cuda" in message
        assert "--precision fp32 or fp16" in message
        assert "NOT_IMPLEMENTED" not in message


def test_the_library_names_arguments_and_the_command_line_flags(tmp_path, monkeypatch):
    def refuse(path):
        raise UserError(f"{path}: max_batch=4, precision=fp16, target=tensorrt-rtx, compute_capabilities=8.6, largest_weight_mb=64")

    monkeypatch.setattr(bundles, "open_bundle", refuse)
    result = CliRunner().invoke(app, ["compile", "x.retnet"])
    assert result.exit_code == 1
    expected = "x.retnet: --max-batch 4, --precision fp16, --target tensorrt-rtx, --compute-capability 8.6, --largest-weight 64"
    assert expected in result.stderr.replace("\n", " ")


LIBRARY = ("runtime", "plan", "export", "graph", "quantize", "compare")
COMMAND = re.compile("retnet-export |`generate |pip install|--system-site-packages|--ptxas-options|:root {")
"""Whole commands are typed in a shell, whoever reads them; and a style sheet has variables."""


def test_no_text_of_the_library_names_a_flag():
    found = []
    for path in (each for folder in LIBRARY for each in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {node: str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr):
                texts.pop(node.value, None)  # a docstring
            elif isinstance(node, ast.JoinedStr):
                texts[node] = "".join(texts.pop(part, "{}") for part in node.values)
        for node, text in texts.items():
            if re.search(r"(?<![\w(-])--[a-z]", text) and not COMMAND.search(text):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert found == []
