"""Activations in eight bits: options that go together, ranges by nvidia-modelopt, and graphs that compute what they say."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.quantize import activations, pipeline
from retnet_export.quantize.activations import ActivationRanges
from retnet_export.quantize.modelopt import Steps
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.quantize.rewrite import products
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import MissingExtraError, UserError
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import measure

needs_modelopt = pytest.mark.skipif(not activations.has_extra(), reason="the extra `activations` is not installed")
TEXT = Path(__file__).parents[2] / "examples" / "classics" / "held-out.txt"
TOKENS = np.random.default_rng(1).integers(0, 50, (4, 24))
CALIBRATION = {"file": "text.txt", "sha256": "", "sequences": len(TOKENS), "length": TOKENS.shape[-1], "tokens": TOKENS}


def ranges_on(bundle, tokens=TOKENS):
    """The largest magnitude of every product's input, read from the float graph itself: what the quantizer should find."""
    model = ir.load(bundle.file("decode.onnx"))
    taps = {name: next(node for node in model.graph if node.name == name).inputs[0] for name in products(model)}
    states = {spec.output for spec in bundle.manifest.state}
    model.graph.outputs.extend(dict.fromkeys(value for value in taps.values() if value.name not in states))
    path = bundle.path / "tapped.onnx"
    ir.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    path.unlink()
    largest = dict.fromkeys(taps, 0.0)
    plain = onnxruntime.InferenceSession(str(bundle.file("decode.onnx")), providers=["CPUExecutionProvider"])
    steps = Steps(plain, tokens)
    while (feeds := steps.get_next()) is not None:
        values = session.run([value.name for value in taps.values()], dict(feeds))
        largest = {name: max(largest[name], float(np.abs(value).max())) for name, value in zip(taps, values, strict=True)}
    return largest


@pytest.fixture
def measured(monkeypatch):
    """Takes the ranges from the float graph, so that what is done with them is tested without the extra."""

    def ranges(source, names, tokens, folder):
        found = ranges_on(source)
        return ActivationRanges({name: found[name] for name in names}, "the float graph")

    monkeypatch.setattr(pipeline, "activation_ranges", ranges)
    monkeypatch.setattr(pipeline, "check_installed", lambda: None)
    monkeypatch.setattr(pipeline, "_calibration", lambda source, path: CALIBRATION | {"file": path.name})


def eight_bit(form, **options):
    return QuantizeOptions(form, activations=form, calibration=TEXT, **options)


def graph_of(bundle, file="decode.onnx"):
    return ir.load(bundle.file(file)).graph


def logits(path, tokens):
    """Logits (T, B, V) of a decode graph as it is written, no operators fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    steps = Steps(session, tokens)
    rows = []
    while (feeds := steps.get_next()) is not None:
        rows.append(session.run(["logits"], dict(feeds))[0])
    return np.stack(rows)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_every_product_with_weights_reads_eight_bits_on_both_sides(tmp_path, measured, name, form):
    config = tiny.CONFIGS[name]
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", eight_bit(form))
    expected = ir.DataType.INT8 if form == "int8" else ir.DataType.FLOAT8E4M3FN
    for file in ("decode.onnx", "prefill.onnx"):
        graph = graph_of(quantized, file)
        rounded = [node for node in graph if node.op_type == "QuantizeLinear"]
        # The head is INT8; with FP8 activations only its weights are.
        assert len(rounded) == 4 * config.num_layers + (form == "int8")
        for node in rounded:
            assert node.inputs[2].const_value.dtype == expected
            assert node.inputs[1].const_value.shape == ir.Shape([])
            dequantized = next(iter(node.outputs[0].consumers()))
            product = next(iter(dequantized.outputs[0].consumers()))
            assert (dequantized.op_type, product.op_type) == ("DequantizeLinear", "MatMul")


def test_scales_follow_from_the_largest_magnitude_and_are_those_of_both_graphs(tmp_path, measured):
    source = tiny.bundle(tmp_path, tiny.config())
    largest = ranges_on(source)
    for form, steps in (("int8", 127), ("fp8", 448)):
        quantized = quantize_bundle(source, tmp_path / f"{form}.retnet", eight_bit(form))
        for file in ("decode.onnx", "prefill.onnx"):
            constants = graph_of(quantized, file).initializers
            scale = constants["layers.1.ffn.down.input_scale"].const_value.numpy()
            assert scale == pytest.approx(largest["layers.1.ffn.down"] / steps, rel=1e-6)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_product_computes_with_the_rounded_activations(tmp_path, measured, form):
    quantized = quantize_bundle(tiny.bundle(tmp_path, tiny.config()), tmp_path / "small.retnet", eight_bit(form))
    model = ir.load(quantized.file("decode.onnx"))
    name = "layers.0.retention.projections"
    node = next(node for node in model.graph if node.name == name)
    x = node.inputs[0].producer().inputs[0].producer().inputs[0]
    model.graph.outputs.extend([x, node.outputs[0]])
    for value in (x, node.outputs[0]):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    path = quantized.path / "tapped.onnx"
    ir.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = Steps(session, TOKENS[:1]).get_first()
    names = [x.name, node.outputs[0].name]
    given, product = session.run(
        names, {key: value for key, value in feeds.items() if key in {"tokens", "position"} or "state" in key}
    )
    constants = graph_of(quantized).initializers
    scale = constants[f"{name}.input_scale"].const_value.numpy()
    grid = (
        np.clip(given / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        if form == "fp8"
        else np.clip(np.rint(given / scale), -128, 127)
    )
    weight = constants[f"{name}.weight.{form}"].const_value.numpy().astype(np.float64)
    expected = (grid.astype(np.float64) * scale) @ (weight * constants[f"{name}.weight.scale"].const_value.numpy())
    assert measure(product, expected).relative < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("form", "bound"), [("int8", 0.04), ("fp8", 0.15)])
def test_the_runtime_steps_and_reads_chunks_close_to_the_float_bundle(tmp_path, measured, precision, form, bound):
    source = tiny.bundle(tmp_path, tiny.config(), precision=precision)
    quantized = quantize_bundle(source, tmp_path / "small.retnet", eight_bit(form))
    expected = logits(source.file("decode.onnx"), TOKENS[:1])[:, 0]
    session = load(quantized.path).session()
    stepped = np.stack([session.step([token])[0].copy() for token in TOKENS[0]])
    chunk = load(quantized.path).session().prefill(TOKENS[:1], np.array([TOKENS.shape[1]]))[0]
    # On the mean: an input that falls to the other side of a step moves single logits by much in a model this small.
    for found, reference in ((stepped, expected), (chunk, expected[-1])):
        assert measure(found, reference).mean < bound * np.std(reference)


def test_norms_state_and_position_stay_float(tmp_path, measured):
    source = tiny.bundle(tmp_path, tiny.config())
    quantized = quantize_bundle(source, tmp_path / "small.retnet", eight_bit("int8"))
    assert quantized.manifest.state == source.manifest.state
    graph = graph_of(quantized, "prefill.onnx")
    for node in graph:
        if node.op_type == "MatMul" and not any(
            value.producer() and value.producer().op_type == "DequantizeLinear" for value in node.inputs
        ):
            assert "retention" in node.name  # scores, and what is read from and added to the state
    for name in ("layers.0.retention_norm.weight", "norm.weight"):
        assert graph.initializers[name].const_value.dtype == ir.DataType.FLOAT


def test_fp8_weights_are_one_byte_and_close(tmp_path, measured):
    source = tiny.bundle(tmp_path, tiny.config(hidden_size=256, ffn_size=512, vocab_size=256))
    quantized = quantize_bundle(source, tmp_path / "small.retnet", eight_bit("fp8", head="fp8"))
    assert quantized.manifest.precision.weights == "float8"
    assert quantized.manifest.weights_bytes < 0.3 * source.manifest.weights_bytes
    assert 0.01 < quantized.manifest.quantization["relative_weight_error"]["weights"] < 0.04
    constants = graph_of(quantized).initializers
    assert constants["head.weight.fp8"].const_value.dtype == ir.DataType.FLOAT8E4M3FN


def test_the_manifest_says_what_was_measured_and_by_what(tmp_path, measured):
    quantize_bundle(tiny.bundle(tmp_path, tiny.config()), tmp_path / "small.retnet", eight_bit("int8"))
    record = json.loads((tmp_path / "small.retnet" / "manifest.json").read_text())["quantization"]
    assert record["activations"] == "int8"
    assert record["activation_ranges"]["by"] == "the float graph"
    assert len(record["activation_ranges"]["largest"]) == 4 * tiny.config().num_layers + 1
    assert open_bundle(tmp_path / "small.retnet").manifest.precision.weights == "int8"


REFUSALS = [
    ({"weights": "int8", "activations": "int4"}, "activations is 'int4', expected int8 or fp8"),
    (
        {"weights": "int4", "activations": "int8"},
        "TensorRT has no product of int8 activations and int4 weights; choose weights=int8",
    ),
    ({"weights": "int8", "activations": "fp8"}, "both sides of a product must have one format"),
    ({"weights": "fp8"}, "weights is 'fp8', which needs activations=fp8; alone, int8 is as small and more exact"),
    ({"weights": "int8", "head": "fp8"}, "head is 'fp8', which needs activations=fp8"),
    (
        {"weights": "int8", "activations": "int8", "head": "fp8"},
        "head is 'fp8', which needs activations=fp8, not int8",
    ),
    (
        {"weights": "int8", "activations": "int8"},
        "activations is 'int8', which measures what flows",
    ),
    ({"weights": "int8", "activations": "int8", "group_size": 64}, "an 8-bit product takes one scale for each output"),
    ({"weights": "int8", "activations": "int8", "method": "awq"}, "method is 'awq', which changes the activations"),
    (
        {"weights": "fp8", "activations": "fp8", "method": "gptq"},
        "method is 'gptq', which chooses integers",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[message[:30] for _, message in REFUSALS])
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError) as refusal:
        QuantizeOptions(**options)
    assert message in str(refusal.value)


def test_a_missing_package_names_the_extra_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "PACKAGES", {"no_such_module": "nvidia-modelopt"})
    source = tiny.bundle(tmp_path, tiny.config())
    with pytest.raises(
        MissingExtraError, match=r"'nvidia-modelopt', which is not installed: pip install 'retnet-export\[activations\]'"
    ):
        quantize_bundle(source, tmp_path / "small.retnet", eight_bit("int8"))
    assert not (tmp_path / "small.retnet").exists()


def test_a_quantizer_that_fails_is_said_with_its_last_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "check_installed", lambda: None)
    monkeypatch.setattr(pipeline, "_calibration", lambda source, path: dict(CALIBRATION))
    monkeypatch.setattr(activations.sys, "executable", "/bin/false")
    source = tiny.bundle(tmp_path, tiny.config())
    with pytest.raises(UserError, match="nvidia-modelopt could not measure the activations: it said nothing"):
        quantize_bundle(source, tmp_path / "small.retnet", eight_bit("int8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.retnet"]


@needs_modelopt
@pytest.mark.parametrize(
    ("name", "precision"), [("fla", "fp32"), ("fla, two queries a key, tied", "fp16"), ("jamie-stirling", "fp32")]
)
def test_modelopt_finds_the_ranges_of_the_float_graph_and_leaves_the_bundle_alone(tmp_path, name, precision):
    source = tiny.bundle(tmp_path, tiny.CONFIGS[name], precision=precision)
    before = {path.name: path.read_bytes() for path in source.path.iterdir()}
    expected = ranges_on(source)
    found = activations.activation_ranges(source, list(expected), TOKENS, tmp_path)
    assert found.by.startswith("nvidia-modelopt ")
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert found.largest == pytest.approx(expected, rel=tolerance)
    assert {path.name: path.read_bytes() for path in source.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [source.path.name]


@needs_modelopt
def test_a_bundle_for_a_fixed_batch_is_calibrated_too(tmp_path):
    source = tiny.bundle(tmp_path, tiny.config(), batch=3)
    expected = ranges_on(source, TOKENS[:3])
    found = activations.activation_ranges(source, list(expected), TOKENS, tmp_path)
    assert found.largest == pytest.approx(expected, rel=1e-5)
