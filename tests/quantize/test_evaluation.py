"""What `evaluate` and `quantize` say about the bundled model, and what they refuse, on a few hundred words of public domain."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.export.verify import PASSAGE
from retnet_export.quantize.evaluation import evaluate, evaluate_all, state_error
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.quantize.reading import by_chunks, by_steps
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "classics"
TOKENS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model as a float bundle, and the passage as a file."""
    path = tmp_path_factory.mktemp("evaluation")
    export_bundle(open_checkpoint(EXAMPLE), path / "float.retnet")
    (path / "text.txt").write_text(PASSAGE, encoding="utf-8")
    return path


def small(folder, weights, **options):
    target = folder / f"{weights}-{options.get('method', 'rtn')}-{options.get('state', 'fp32')}.retnet"
    if not target.exists():
        quantize_bundle(load(folder / "float.retnet").bundle, target, QuantizeOptions(weights, **options))
    return load(target, threads=1)


def compared(folder, model):
    reference = load(folder / "float.retnet", threads=1)
    result = evaluate(model, folder / "text.txt", against=reference, tokens=TOKENS)
    assert result.comparison is not None
    return result


def test_a_bundle_is_no_distance_from_itself(folder):
    comparison = compared(folder, load(folder / "float.retnet", threads=1)).comparison
    assert (comparison.kl_mean, comparison.agreement, comparison.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert set(comparison.greedy) == {128}
    assert all(error == 0 for entry in comparison.state for error in entry.by_head)


@pytest.mark.parametrize("prefix", [(), (5,), (5, 9)])
def test_perplexity_and_bits_per_byte_are_those_of_the_logits(folder, prefix):
    model = load(folder / "float.retnet", threads=1)
    model.tokenizer.spec = replace(model.tokenizer.spec, prefix_ids=prefix)
    tokens = [*prefix, *model.tokenizer.encode(PASSAGE)][:TOKENS]
    given = max(1, len(prefix))  # the tokens that begin every text are not predicted
    session, loss = model.session(), 0.0
    for index, (token, following) in enumerate(itertools.pairwise(tokens), 1):
        logits = session.step([token])[0].astype(np.float64)
        loss += (np.log(np.exp(logits).sum()) - logits[following]) * (index >= given)
    result = evaluate(model, folder / "text.txt", tokens=TOKENS)
    assert result.perplexity == pytest.approx(np.exp(loss / (TOKENS - given)), rel=1e-5)
    assert result.bytes == len(model.tokenizer.decode(tokens[given:]).encode())
    assert result.bits_per_byte == pytest.approx(loss / np.log(2) / result.bytes, rel=1e-5)


@pytest.mark.parametrize(("weights", "tolerance"), [("float", "chunkwise-float32"), ("int4", "onnxruntime-quantized")])
def test_reading_in_chunks_is_reading_by_steps(folder, weights, tolerance):
    model = load(folder / "float.retnet", threads=1) if weights == "float" else small(folder, weights)
    tokens = np.array(model.tokenizer.encode(PASSAGE)[:200])
    chunked, stepped = (model.backend.open_runner(1) for _ in range(2))
    assert measure(by_chunks(chunked, tokens, 64), by_steps(stepped, tokens)).relative < TOLERANCES[tolerance].relative
    for name, value in stepped.read_state(0).items():
        assert name == "position" or measure(chunked.read_state(0)[name], value).relative < TOLERANCES[tolerance].relative
    fast, slow = (evaluate(model, folder / "text.txt", tokens=TOKENS, steps=steps) for steps in (None, True))
    assert (fast.by_steps, slow.by_steps) == (False, True)
    assert fast.perplexity == pytest.approx(slow.perplexity, rel=1e-5 if weights == "float" else 1e-2)


def test_a_bundle_with_a_state_of_fewer_bits_is_read_by_steps_with_the_other_one(folder):
    reference, model = load(folder / "float.retnet", threads=1), small(folder, "int8", state="fp16")
    assert evaluate(model, folder / "text.txt", against=reference, tokens=TOKENS).by_steps
    assert evaluate(reference, folder / "text.txt", against=model, tokens=TOKENS).by_steps
    assert not evaluate(model, folder / "text.txt", tokens=TOKENS, steps=False).by_steps


@pytest.mark.parametrize(("options", "said"), [((), "read in chunks"), (("--steps",), "read token by token")])
def test_the_command_says_how_it_read(folder, options, said):
    arguments = ["evaluate", folder / "float.retnet", "--text", folder / "text.txt", "--tokens", 200, *options]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.output.split())


def test_several_bundles_at_once_get_what_each_gets_alone(folder):
    models = [small(folder, "int8"), small(folder, "int4")]
    reference = load(folder / "float.retnet", threads=1)
    together = evaluate_all(models, folder / "text.txt", against=reference, tokens=TOKENS)
    assert together == [compared(folder, model) for model in models]


def test_a_text_read_to_its_last_token_is_predicted_but_for_the_first(folder):
    model = load(folder / "float.retnet", threads=1)
    count = 129  # the last chunk is a single token, which nothing follows
    result, whole = (evaluate(model, folder / "text.txt", tokens=tokens) for tokens in (count, count - 1))
    predicted = len(model.tokenizer.decode(model.tokenizer.encode(PASSAGE)[1:count]).encode())
    assert (result.tokens, result.bytes) == (count, predicted)
    assert result.perplexity != whole.perplexity


def test_the_error_of_a_state_is_that_of_each_head_over_all_layers():
    random = np.random.default_rng(0)
    state = {"position": np.array([7])} | {f"state.00{layer}": random.standard_normal((1, 2, 4, 4)) for layer in range(2)}
    doubled = {name: array * np.array([1, 2])[None, :, None, None] if array.ndim == 4 else array for name, array in state.items()}
    turned = {name: array.swapaxes(2, 3) if array.ndim == 4 else array for name, array in state.items()}
    assert state_error(7, state, state).by_head == (0.0, 0.0)
    assert state_error(7, doubled, state).by_head == pytest.approx((0.0, 1.0))
    assert min(state_error(7, turned, state).by_head) > 0.5  # equal sizes are no reason to turn it


def test_bundles_of_different_tokenizers_are_refused(folder, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(EXAMPLE, checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = []
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    export_bundle(open_checkpoint(checkpoint), tmp_path / "letters.retnet")
    arguments = ["evaluate", tmp_path / "letters.retnet", "--text", folder / "text.txt", "--against", folder / "float.retnet"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert "cut the text into different tokens: their tokenizers differ" in " ".join(result.output.split())


def test_too_few_tokens_are_refused_by_the_option_that_asks_for_them(folder):
    arguments = ["evaluate", folder / "float.retnet", "--text", folder / "text.txt", "--tokens", 1]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "--tokens is 1, less than one chunk of 128; read more of the text" in result.output


def test_eight_bits_cost_next_to_nothing_and_four_bits_little(folder):
    eight, four = (compared(folder, small(folder, weights)).comparison for weights in ("int8", "int4"))
    assert eight.kl_mean < 1e-3 < four.kl_mean < 5e-2
    assert eight.agreement > 0.97
    assert four.agreement > 0.8


def test_gptq_comes_closer_to_the_float_model_than_rounding(folder):
    gptq = compared(folder, small(folder, "int4", method="gptq", calibration=folder / "text.txt")).comparison
    assert gptq.kl_mean < compared(folder, small(folder, "int4")).comparison.kl_mean


def test_a_half_precision_state_loses_most_where_the_decay_is_slowest(folder):
    by_head = compared(folder, small(folder, "int8", state="fp16")).comparison.state[-1].by_head
    exact = compared(folder, small(folder, "int8")).comparison.state[-1].by_head
    assert by_head[-1] > exact[-1]
    assert max(by_head) < 0.02


def test_quantize_prints_one_document_and_records_the_evaluation(folder):
    target = folder / "recorded.retnet"
    arguments = [
        "quantize",
        folder / "float.retnet",
        "-o",
        target,
        "--weights",
        "int8",
        "--evaluate",
        folder / "text.txt",
        "--json",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["quantization"]["evaluation"]
    assert record == json.loads((target / "manifest.json").read_text())["quantization"]["evaluation"]
    assert 0.99 < record["comparison"]["perplexity_ratio"] < 1.01


UNFIT = [
    (b"", "empty; give a text of the kind that the model will continue"),
    (b"In the beginning", "tokens, shorter than one chunk of 128; give a longer text"),
    (b"\xff\xfe\x00caf\xe9" * 100, "not UTF-8 text (byte 0); convert it first"),
    (None, "cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("content", "message"), UNFIT, ids=["empty", "short", "not UTF-8", "missing"])
@pytest.mark.parametrize("use", ["--calibration", "--evaluate", "evaluate"])
def test_an_unfit_text_is_refused_and_leaves_no_bundle(folder, tmp_path, content, message, use):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    source, target = folder / "float.retnet", tmp_path / "new.retnet"
    options = {
        "--calibration": ["quantize", source, "-o", target, "--method", "gptq", "--calibration", text],
        "--evaluate": ["quantize", source, "-o", target, "--evaluate", text],
        "evaluate": ["evaluate", source, "--text", text],
    }[use]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not target.exists()
