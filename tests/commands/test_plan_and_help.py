"""Names that a user must type are printed whole at any width; options have an effect or are refused."""

from __future__ import annotations

import json
import os

import pytest
import typer
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.plan.devices import DEVICES
from retnet_export.runtime.backends import THREADS_PER_CORE
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load

COMMANDS = typer.main.get_command(app).commands
MODEL = ("--layers", "24", "--width", "2048")


def run(*arguments: object, code: int = 0, columns: int = 80):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_cuts_no_option_and_no_sentence(name, columns):
    printed = run(name, "--help", columns=columns).stdout
    assert "…" not in printed.replace("N,…", "")  # which is how `bench` writes a list of numbers
    for parameter in COMMANDS[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in printed or parameter.param_type_name == "argument"
    words = " ".join(printed.split())
    assert " ".join((COMMANDS[name].help or "").split()) in words


def test_the_list_of_commands_says_all_that_they_do():
    words = " ".join(run("--help").stdout.split())
    for name, command in COMMANDS.items():
        assert f"{name} {' '.join((command.help or '').split())}" in words


def test_every_device_is_named_whole_in_a_pipe_and_in_80_columns():
    lines = run("plan", *MODEL, "--devices").stdout.splitlines()
    assert {line.split()[0] for line in lines if line and line.split()[0] in DEVICES} == set(DEVICES)


def test_a_model_that_does_not_fit_has_no_speed():
    large = ("plan", "--layers", 48, "--width", 8192)
    printed = run(*large, "--device", "orin-nano-8gb").stdout
    assert "NO: it needs" in printed
    assert "none: it does not fit" in printed
    row = next(line for line in run(*large, "--devices").stdout.splitlines() if line.startswith("orin-nano-8gb "))
    assert row.split()[1] == "no"
    assert row.split()[4:6] == ["—", "—"]
    record = json.loads(run(*large, "--device", "orin-nano-8gb", "--json").stdout)["devices"][0]
    assert (record["fits"], record["tokens_per_second"], record["range"]) == (False, None, None)


@pytest.mark.parametrize(
    "options", [("--weights", "int4"), ("--state", "fp16"), ("--heads", 4), ("--ffn", 64), ("--vocabulary", 100), ("--layers", 3)]
)
def test_a_size_beside_a_bundle_is_refused(example_bundle, options):
    message = run("plan", example_bundle.path, "--device", "h100", *options, code=2).stderr
    assert f"{options[0]} cannot be combined with a bundle" in message


def test_plan_predicts_for_sizes_what_it_predicts_for_a_bundle_of_them(example_bundle):
    """Chunks of a prompt included: those that `export` writes."""
    config = example_bundle.manifest.model
    sizes = {"layers": config.num_layers, "width": config.hidden_size, "heads": config.num_heads, "ffn": config.ffn_size}
    sizes |= {"vocabulary": config.vocab_size, "weights": "fp32", "state": "fp32"}
    options = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    (given,), (read,) = (
        json.loads(run("plan", *model, "--device", "h100", "--json").stdout)["devices"]
        for model in (options, [example_bundle.path])
    )
    scratch = [found["memory_at_peak_bytes"] - found["memory_at_rest_bytes"] for found in (given, read)]
    assert scratch[0] == scratch[1]


@pytest.mark.parametrize("threads", [100_000, 0, -1])
def test_threads_without_end_are_refused_at_once(example_bundle, threads):
    cores = os.cpu_count()
    with pytest.raises(
        UserError, match=rf"threads is {threads}, expected 1 to {THREADS_PER_CORE * cores}: this machine has {cores}"
    ):
        load(example_bundle.path, "onnxruntime", threads=threads)
