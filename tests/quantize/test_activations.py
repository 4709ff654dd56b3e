"""Activations in eight bits: options that go together, their ranges, and graphs that compute what they say."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.graph.loading import load_graph
from retnet_export.graph.variants.element_types import InferElementTypes
from retnet_export.quantize import calibration
from retnet_export.quantize.calibration import activation_ranges
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.quantize.rewrite import products
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import measure

TEXT = Path(__file__).parents[2] / "examples" / "classics" / "held-out.txt"
TOKENS = np.random.default_rng(1).integers(0, 50, (4, 24))


def run_steps(path, tokens, wanted):
    """Values of a decode graph as it is written, no operators fused, after every token of (B, T): one list a step."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    carried = {
        value.name: np.zeros((len(tokens), *value.shape[1:]), types[value.type])
        for value in session.get_inputs()
        if value.name != "tokens"
    }
    for token in tokens.T:
        names = [*wanted, *(f"{name}_out" for name in carried)]
        values = session.run(names, {"tokens": token[:, None], **carried})
        carried = dict(zip(carried, values[len(wanted) :], strict=True))
        yield values[: len(wanted)]


def ranges_on(bundle, tokens=TOKENS):
    """The largest magnitude of every product's input, read from the whole float graph."""
    model = ir.load(bundle.file("decode.onnx"))
    taps = {name: next(node for node in model.graph if node.name == name).inputs[0] for name in products(model)}
    states = {spec.output for spec in bundle.manifest.state}
    InferElementTypes()(model)
    model.graph.outputs.extend(dict.fromkeys(value for value in taps.values() if value.name not in states))
    path = bundle.path / "tapped.onnx"
    ir.save(model, path)
    steps = list(run_steps(path, tokens, [value.name for value in taps.values()]))
    path.unlink()
    return {name: max(float(np.abs(values[index]).max()) for values in steps) for index, name in enumerate(taps)}


@pytest.fixture
def measured(monkeypatch):
    """Takes random tokens for the calibration text: the tiny bundles have no tokenizer."""
    monkeypatch.setattr(calibration, "calibration_tokens", lambda model, path: TOKENS)


def eight_bit(form, **options):
    return QuantizeOptions(form, activations=form, calibration=TEXT, **options)


def graph_of(bundle, file="decode.onnx"):
    return ir.load(bundle.file(file)).graph


def logits(path, tokens):
    """Logits (T, B, V) of a decode graph."""
    return np.stack([values[0] for values in run_steps(path, tokens, ["logits"])])


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
    given, product = next(run_steps(path, TOKENS[:1], [x.name, node.outputs[0].name]))
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


def test_the_manifest_says_what_was_measured(tmp_path, measured):
    quantize_bundle(tiny.bundle(tmp_path, tiny.config()), tmp_path / "small.retnet", eight_bit("int8"))
    record = json.loads((tmp_path / "small.retnet" / "manifest.json").read_text())["quantization"]
    assert record["activations"] == "int8"
    assert len(record["activation_ranges"]) == 4 * tiny.config().num_layers + 1
    assert open_bundle(tmp_path / "small.retnet").manifest.precision.weights == "int8"


REFUSALS = [
    ({"weights": "int8", "activations": "int4"}, "activations is 'int4', expected int8 or fp8"),
    (
        {"weights": "int4", "activations": "int8"},
        "TensorRT has no product of int8 activations and int4 weights; choose weights=int8",
    ),
    ({"weights": "int8", "activations": "fp8"}, "both sides of a product must have one format"),
    ({"weights": "fp8"}, "weights is 'fp8', which needs activations=fp8; without it int8 is as small and more exact"),
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


def measured_ranges(source):
    decode = load_graph(source, "decode.onnx")
    return activation_ranges(source, decode, TOKENS, products(decode))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_ranges_are_those_of_the_float_graph(tmp_path, name, precision):
    source = tiny.bundle(tmp_path, tiny.CONFIGS[name], precision=precision)
    assert measured_ranges(source) == pytest.approx(ranges_on(source), rel=1e-5 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize("batch", [3, 6])
def test_a_bundle_for_a_fixed_batch_is_calibrated_too(tmp_path, batch):
    source = tiny.bundle(tmp_path, tiny.config(), batch=batch)
    rows = np.resize(TOKENS, (batch, TOKENS.shape[1]))
    assert measured_ranges(source) == pytest.approx(ranges_on(source, rows), rel=1e-5)
