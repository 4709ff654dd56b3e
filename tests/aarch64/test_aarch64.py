"""The runtime on an emulated aarch64 processor gives what it gives here, and saved states move between the two.

`make test-aarch64` builds the machine (scripts/aarch64.py) and names it in RETNET_EXPORT_AARCH64.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from retnet_export.runtime import Session, Snapshot, load

ROOT = Path(__file__).parents[2]
MACHINE = os.environ.get("RETNET_EXPORT_AARCH64")
VERSIONS = os.environ.get("RETNET_EXPORT_AARCH64_ONNXRUNTIME", "1.23.2").split(",")
PROMPT, NEW_TOKENS = "HAMLET.\nWhat, my lord?\n", 24
TIES = {"fp32": 1e-3, "int8": 0.1, "int4": 0.1}
"""How far below the largest logit here a token chosen there may lie. Products with integer weights round their other operand to 8
bits, and kernels differ in how: logits of about 10 were up to 0.03 apart, and one of 24 choices was nearer than that."""

pytestmark = pytest.mark.skipif(MACHINE is None, reason="no emulated aarch64 machine: make test-aarch64 builds one")

THERE = """
import json, platform, sys
import onnxruntime
from retnet_export.runtime import Session, Snapshot, load

prompt, count, *folders = sys.argv[1:]
result = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__}
for folder in folders:
    model = load(folder, "onnxruntime", threads=1)
    session = model.session()
    session.feed(prompt)
    session.snapshot().save(folder + ".there.state")
    tokens = list(session.generate_tokens(temperature=0.0, max_new_tokens=int(count)))
    session.restore(Snapshot.load(folder + ".here.state"))
    moved = list(session.generate_tokens(temperature=0.0, max_new_tokens=int(count)))
    result[folder] = {"tokens": tokens, "moved": moved}
print(json.dumps(result))
"""


def emulated(version: str, *arguments: str | Path) -> list[str]:
    specification = importlib.util.spec_from_file_location("aarch64", ROOT / "scripts/aarch64.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.command(Path(MACHINE), version, *arguments)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def cli(version: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return run(emulated(version, "-m", "retnet_export", *arguments))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The bundled model in three formats, each with a state saved here after the prompt, and the greedy tokens after it in fp32."""
    from retnet_export.export.checkpoints import open_checkpoint
    from retnet_export.export.pipeline import export_bundle
    from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle

    folder = tmp_path_factory.mktemp("aarch64")
    bundle = export_bundle(open_checkpoint(ROOT / "examples/classics"), folder / "fp32.retnet")
    made = {"fp32": bundle.path}
    for weights in ("int8", "int4"):
        made[weights] = quantize_bundle(bundle, folder / f"{weights}.retnet", QuantizeOptions(weights=weights)).path
    for path in made.values():
        after_prompt(path).snapshot().save(f"{path}.here.state")
    return made, list(after_prompt(made["fp32"]).generate_tokens(temperature=0.0, max_new_tokens=NEW_TOKENS))


def after_prompt(path: Path) -> Session:
    session = load(path, "onnxruntime").session()
    session.feed(PROMPT)
    return session


def shortfall(path: Path, tokens: list[int]) -> float:
    """The most by which one of these tokens misses the largest logit here, each after the ones before it."""
    session, most = after_prompt(path), 0.0
    for token in tokens:
        logits = session.logits[0]
        most = max(most, float(logits.max() - logits[token]))
        session.step([token])
    return most


@pytest.mark.parametrize("version", VERSIONS)
def test_each_format_gives_the_tokens_it_gives_here_and_states_move_both_ways(bundles, version):
    made, _ = bundles
    result = run(emulated(version, "-c", THERE, PROMPT, str(NEW_TOKENS), *made.values()))
    assert result.returncode == 0, result.stderr[-2000:]
    there = json.loads(result.stdout.splitlines()[-1])
    assert (there["machine"], there["onnxruntime"]) == ("aarch64", version)
    for name, path in made.items():
        for tokens in there[str(path)].values():
            assert len(tokens) == NEW_TOKENS
            assert shortfall(path, tokens) <= TIES[name], name
        session = load(path, "onnxruntime").session()
        session.restore(Snapshot.load(f"{path}.there.state"))
        moved = list(session.generate_tokens(temperature=0.0, max_new_tokens=NEW_TOKENS))
        assert shortfall(path, moved) <= TIES[name], name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("doctor",), "onnxruntime"), (("inspect", "{int4}"), "int4"), (("plan", "{int4}", "--device", "orin-nano-8gb"), "tokens")],
    ids=["doctor", "inspect", "plan"],
)
def test_a_command_answers(bundles, arguments, expected):
    made, _ = bundles
    result = cli(VERSIONS[0], *(argument.format(**made) for argument in arguments))
    assert result.returncode == 0, result.stderr[-2000:]
    assert expected in result.stdout


def test_serve_answers_as_here_and_ends_well_at_sigterm(bundles):
    made, greedy = bundles
    command = emulated(VERSIONS[0], "-m", "retnet_export", "serve", made["fp32"], "--port", "0", "--threads", "1")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("ready"):
                break
        assert lines, process.wait()
        assert lines[-1].startswith("ready"), lines
        (address,) = re.findall(r"http://[\d.:]+", lines[0])
        with httpx.Client(base_url=address, timeout=120) as client:
            assert client.get("/health").json() == {"status": "ok"}
            body = {"prompt": PROMPT, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == load(made["fp32"], "onnxruntime").tokenizer.decode(greedy)
        assert answer["usage"]["completion_tokens"] == NEW_TOKENS
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_report_from_the_field_runs_to_its_end_and_says_what_it_could_not_run(bundles, tmp_path):
    made, _ = bundles
    command = tmp_path / "bin/retnet-export"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nexec " + " ".join(emulated(VERSIONS[0], "-m", "retnet_export")) + ' "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    report = tmp_path / "report.txt"
    environment = {**os.environ, "PATH": path, "RETNET_BENCH": "--prompt 32 --new 8 --repetitions 1"}
    result = run(["bash", str(ROOT / "scripts/jetson-check.sh"), str(made["int4"]), str(report)], env=environment)
    text = report.read_text()
    assert result.returncode == 1  # no GPU: its steps fail, and are counted
    assert "generate, ONNX Runtime on the CPU" in text
    assert text.count("[ok]") >= 3
    assert "compile" in text
    assert "steps failed" in text.splitlines()[-1]
