"""A bundle's variants: the same integers, the same answers, one copy of the weights; the runtime takes the best that it can run."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime_api import best_variant, is_older
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import PrecisionWarning
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

NEEDS_OPERATORS = pytest.mark.skipif(
    is_older(onnxruntime.__version__, (1, 32)), reason="ONNX Runtime before 1.32 lacks these operators on the CPU"
)
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_key_dim": 64, "ffn_size": 128}
CONFIG = tiny.config(**SIZES, head_value_dim=128)
TIED = tiny.config(**SIZES, head_value_dim=128, tied_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 64, 12)
OTHERS = ("onnxruntime-cpu",)
INTEGERS = "onnxruntime-cpu-integers"


def logits(bundle, variant):
    runner = tiny.model(bundle, variant).backend.open_runner(1)
    rows = []
    for token in TOKENS:
        runner.step(np.array([token]))
        rows.append(runner.logits()[0].copy())
    runner.prefill(TOKENS[None], np.array([len(TOKENS)]))
    return np.stack([*rows, runner.logits()[0]])


def operators(bundle, variant, graph="decode"):
    return [node.op_type for node in ir.load(bundle.file(bundle.manifest.variants[variant].graphs[graph].file)).graph]


def quantized(folder, config, weights, **options):
    return quantize_bundle(tiny.bundle(folder, config, **options), folder / "q.retnet", QuantizeOptions(weights))


@NEEDS_OPERATORS
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied head"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_variants_answer_alike(tmp_path, config, weights):
    bundle = open_bundle(quantized(tmp_path, config, weights).path)  # with its hashes
    assert list(bundle.manifest.variants) == ["portable", "onnxruntime-cpu", INTEGERS]
    expected = logits(bundle, "portable")
    for variant in OTHERS:
        assert measure(logits(bundle, variant), expected).relative < TOLERANCES["onnxruntime-quantized"].relative


@NEEDS_OPERATORS
@pytest.mark.parametrize(("precision", "name"), [("fp32", "onnxruntime-float32"), ("fp16", "onnxruntime-float16")])
def test_float_variants_answer_alike(tmp_path, precision, name):
    bundle = tiny.bundle(tmp_path, CONFIG, precision=precision)
    expected = logits(bundle, "portable")
    for variant in OTHERS:
        assert measure(logits(bundle, variant), expected).relative < TOLERANCES[name].relative


@pytest.mark.parametrize("make", [tiny.bundle, lambda folder, config: quantized(folder, config, "int8")], ids=["float", "int8"])
def test_variants_read_one_copy_of_the_weights(tmp_path, make):
    bundle = make(tmp_path, TIED)
    assert [name for name in bundle.manifest.files if name.endswith(".bin")] == ["weights.bin"]
    spans = []  # of the decode graphs
    for variant in bundle.manifest.variants.values():
        tensors = [value.const_value for value in ir.load(bundle.file(variant.graphs["decode"].file)).graph.initializers.values()]
        spans.append({(tensor.offset, tensor.length) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})
    assert spans[0] == spans[1]


def test_the_manifest_says_what_each_variant_needs(tmp_path):
    variants = tiny.bundle(tmp_path, CONFIG).manifest.variants
    assert variants["portable"].needs is None
    cpu = variants["onnxruntime-cpu"].needs
    assert (cpu.onnxruntime, cpu.provider) == ("1.25", "cpu")
    assert "com.microsoft::LinearAttention" in cpu.operators


@pytest.mark.parametrize(
    ("version", "provider", "expected"),
    [
        ("1.23.2", "cpu", INTEGERS),
        ("1.25.0", "cpu", "onnxruntime-cpu"),
        ("1.32.0", "cpu", "onnxruntime-cpu"),
        ("1.32.0", "cuda", "portable"),
    ],
)
def test_the_best_variant_is_taken_that_the_version_runs(tmp_path, monkeypatch, version, provider, expected):
    bundle = quantized(tmp_path, CONFIG, "int8")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert best_variant(bundle.manifest, provider) == expected


@NEEDS_OPERATORS
def test_the_variant_in_use_is_printed(example_bundle):
    path = str(example_bundle.path)
    assert "<Model classics on onnxruntime (onnxruntime-cpu)" in repr(load(path, "onnxruntime"))
    inspected = CliRunner().invoke(app, ["inspect", path]).output
    assert f"onnxruntime-cpu on the CPU, ONNX Runtime {onnxruntime.__version__}" in inspected
    arguments = ["generate", path, "--prompt", "In", "--backend", "onnxruntime", "--max-new-tokens", "2"]
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["variant"] == "onnxruntime-cpu"
    assert "onnxruntime, onnxruntime-cpu graphs" in CliRunner().invoke(app, [*arguments, "--stats"]).stderr


def test_inspect_names_no_variant_for_products_that_the_cpu_lacks(tmp_path):
    with pytest.warns(PrecisionWarning, match="no kernels for it on a CPU"):
        bundle = tiny.bundle(tmp_path, CONFIG, precision="bf16")
    assert (
        "nothing on the CPU: ONNX Runtime has no products of bfloat16 there"
        in CliRunner().invoke(app, ["inspect", str(bundle.path)]).output
    )


def test_a_snapshot_file_moves_between_variants(tmp_path):
    bundle = quantized(tmp_path, CONFIG, "int4")
    sessions = [tiny.model(bundle, name).session() for name in ("portable", INTEGERS)]
    sessions[0].feed([3, 1, 4, 1, 5])
    sessions[0].snapshot().save(tmp_path / "five.state")
    sessions[1].restore(Snapshot.load(tmp_path / "five.state"))
    for session in sessions:
        session.step([9])
    assert measure(sessions[1].logits, sessions[0].logits).relative < TOLERANCES["onnxruntime-quantized"].relative


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied head"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_for_older_versions_products_of_bytes_are_integer_products(tmp_path, config, weights):
    bundle = quantized(tmp_path, config, weights)
    for graph in ("decode", "prefill"):
        found = operators(bundle, INTEGERS, graph)
        assert "MatMulInteger" in found
    assert bundle.manifest.variants[INTEGERS].needs.onnxruntime == "1.20"
    error = measure(logits(bundle, INTEGERS), logits(bundle, "portable"))
    assert error.relative < TOLERANCES["onnxruntime-quantized"].relative


def test_a_row_of_an_integer_product_does_not_depend_on_the_others(tmp_path):
    model = tiny.model(quantized(tmp_path, CONFIG, "int8"), INTEGERS)
    alone, together = model.backend.open_runner(1), model.backend.open_runner(3)
    for token in TOKENS:
        alone.step(np.array([token]))
        together.step(np.array([9, token, 63 - token]))
    np.testing.assert_array_equal(together.logits()[1], alone.logits()[0])


def test_float_bundles_have_no_integer_products(tmp_path):
    assert INTEGERS not in tiny.bundle(tmp_path, CONFIG).manifest.variants
