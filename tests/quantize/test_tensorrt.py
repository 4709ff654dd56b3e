"""TensorRT-RTX builds quantized bundles, and its engines keep the weights at four and eight bits."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.graph.weights import weight_shapes
from retnet_export.quantize import calibration
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.errors import UserError

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

CONFIG = tiny.config(hidden_size=512, ffn_size=2048, head_value_dim=128, head_key_dim=64, vocab_size=16384)
TEXT = Path(__file__).parents[2] / "examples" / "classics" / "held-out.txt"
FLOAT16_BYTES = 2 * sum(int(np.prod(shape)) for shape in weight_shapes(CONFIG).values())


def engine_bytes(path):
    """Size of the engine of one graph, for one sequence (and 16 tokens where the graph takes several), compute capability 8.6."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [1 if size == -1 and axis == 0 else 16 if size == -1 else size for axis, size in enumerate(tensor.shape)]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine.nbytes


@pytest.mark.parametrize("graph", ["decode.onnx", "prefill.onnx"])
@pytest.mark.parametrize(("weights", "precision"), [("int8", "fp32"), ("int4", "fp16")])
def test_the_engine_holds_the_integers(tmp_path, graph, weights, precision):
    source = tiny.bundle(tmp_path, CONFIG, precision=precision)
    quantized = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions(weights, head=weights, embedding=weights))
    # Beside the weights an engine has up to two megabytes of its own; as half-precision floats it would be twice as large.
    assert engine_bytes(quantized.file(graph)) < quantized.manifest.weights_bytes + 3e6
    assert quantized.manifest.weights_bytes + 3e6 < 0.9 * FLOAT16_BYTES


def eight_bit(folder, form, monkeypatch, **options):
    """A bundle with activations in eight bits; calibrated on random tokens."""
    monkeypatch.setattr(calibration, "calibration_tokens", lambda model, path: np.arange(32)[None])
    source = tiny.bundle(folder, options.pop("config", CONFIG), precision=options.pop("precision", "fp16"))
    chosen = QuantizeOptions(form, activations=form, calibration=TEXT, **options)
    return quantize_bundle(source, folder / "small.retnet", chosen)


@pytest.mark.parametrize(
    ("form", "head", "precision", "capabilities"),
    [
        ("int8", "int8", "fp16", ("8.6", "8.9", "12.0")),
        ("int8", "int8", "fp32", ("8.6",)),
        ("fp8", "int8", "fp16", ("8.9", "12.0")),
        ("fp8", "fp8", "fp32", ("8.9",)),
    ],
)
def test_eight_bit_activations_build_and_the_engine_keeps_the_weights_at_eight_bits(
    tmp_path, monkeypatch, form, head, precision, capabilities
):
    quantized = eight_bit(tmp_path, form, monkeypatch, precision=precision, head=head)
    record = compile_bundle(quantized, CompileOptions("tensorrt-rtx", capabilities))
    assert record.weights_bytes < 1.1 * quantized.manifest.weights_bytes


def test_a_tied_head_with_eight_bit_activations_builds(tmp_path, monkeypatch):
    config = tiny.config(hidden_size=256, ffn_size=512, head_value_dim=32, vocab_size=2048, tied_embeddings=True)
    quantized = eight_bit(tmp_path, "int8", monkeypatch, config=config)
    assert (
        compile_bundle(quantized, CompileOptions("tensorrt-rtx", ("8.6",))).weights_bytes < 1.5 * quantized.manifest.weights_bytes
    )


@pytest.mark.parametrize("capabilities", [("8.6",), ("8.9", "8.6")])
def test_fp8_is_refused_before_the_build_for_gpus_that_have_none(tmp_path, monkeypatch, capabilities):
    quantized = eight_bit(tmp_path, "fp8", monkeypatch, config=tiny.config())
    with pytest.raises(UserError, match=r"weights in float8 need compute capability 8\.9 or later, this is for 8\.6"):
        compile_bundle(quantized, CompileOptions("tensorrt-rtx", capabilities))
    assert not (quantized.path / "engines").exists()


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_what_is_measured_on_the_bundled_model_builds_and_keeps_eight_bits(tmp_path, form):
    root = Path(__file__).parents[2] / "examples" / "classics"
    source = export_bundle(open_checkpoint(root), tmp_path / "classics.retnet")
    options = QuantizeOptions(form, activations=form, calibration=root / "held-out.txt")
    quantized = quantize_bundle(source, tmp_path / "small.retnet", options)
    assert len(quantized.manifest.quantization["activation_ranges"]) == (21 if form == "int8" else 20)
    record = compile_bundle(quantized, CompileOptions("tensorrt-rtx", ("8.9",)))
    assert record.weights_bytes < 0.32 * source.manifest.weights_bytes
