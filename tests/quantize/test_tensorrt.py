"""TensorRT-RTX builds quantized bundles, and its engines keep the weights at four and eight bits."""

import numpy as np
import pytest
import tiny

from retnet_export.graph.weights import weight_shapes
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

CONFIG = tiny.config(hidden_size=512, ffn_size=2048, head_value_dim=128, head_key_dim=64, vocab_size=16384)
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
