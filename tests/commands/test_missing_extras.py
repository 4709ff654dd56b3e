"""With the packages of `.[cpu]` alone a command works, or says in one line which extra it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT

from retnet_export.runtime.errors import EXTRAS, MissingExtraError, missing_extra

ABSENT = sorted(set(EXTRAS) - {"onnxruntime", "huggingface_hub", "pydantic"})  # typer and tokenizers may bring the last two


def run(*arguments: object, absent: list[str] = ABSENT) -> subprocess.CompletedProcess[str]:
    """The command line in a process in which some modules cannot be imported."""
    script = (
        f"import sys; sys.modules |= dict.fromkeys({absent!r}); from retnet_export.cli import app; app(prog_name='retnet-export')"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("export", EXAMPLE, "-o", "{tmp}/a"), "export"),
        (("verify", "{bundle}", "--checkpoint", EXAMPLE), "export"),
        (("quantize", "{bundle}", "-o", "{tmp}/a"), "export"),
        (("quantize", "{bundle}", "-o", "{tmp}/a", "--method", "gptq", "--calibration", EXAMPLE / "held-out.txt"), "export"),
        (("compare", "{bundle}", "-o", "{tmp}/a"), "compare"),
        (("compile", "{bundle}", "--target", "tensorrt-rtx"), "tensorrt-rtx"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_one_line_names_the_extra(arguments, extra, example_bundle, tmp_path):
    result = run(*(str(argument).format(bundle=example_bundle.path, tmp=tmp_path) for argument in arguments))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"pip install 'retnet-export[{extra}]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_evaluate_needs_the_runtime_only(example_bundle):
    text = EXAMPLE / "held-out.txt"
    result = run("evaluate", example_bundle.path, "--text", text, "--against", example_bundle.path, "--tokens", 128, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["comparison"]["kl_mean"] == pytest.approx(0, abs=1e-12)


def test_a_fault_of_our_own_keeps_its_traceback():
    assert missing_extra(ModuleNotFoundError("No module named 'retnet_export.absent'", name="retnet_export.absent"), "x") is None
    found = missing_extra(ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir.passes"), "`retnet-export quantize`")
    assert isinstance(found, MissingExtraError)
    assert str(found).startswith("`retnet-export quantize` needs the package 'onnx-ir', which is not installed")


def test_every_optional_module_that_is_imported_is_one_that_an_extra_brings():
    """A new import of an optional package anywhere in the package must be known to the message."""
    import ast

    base = {"numpy", "typer", "rich", "tokenizers", "safetensors", "click", "retnet_export"}
    elsewhere = {"onnxruntime_genai", "tensorrt", "cuda", "typing_extensions"}  # said where they are used, or of types alone
    names: dict[str, Path] = {}
    folders = ("commands", "compare", "export", "graph", "plan", "quantize", "runtime")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names[node.module.partition(".")[0]] = path
    strange = {
        name: path
        for name, path in names.items()
        if name not in base | elsewhere | set(EXTRAS) and name not in sys.stdlib_module_names and name != "__future__"
    }
    assert strange == {}
