"""Quantized weights stay quantized in ONNX Runtime: no float copy in the graph it runs, nor in memory."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime_api import FUSES_INTEGERS, is_older

pytestmark = pytest.mark.skipif(
    is_older(onnxruntime.__version__, FUSES_INTEGERS), reason="ONNX Runtime before 1.25 does not fuse 8-bit weights"
)
MEMORY = """
import ctypes
import sys
from pathlib import Path
from retnet_export.runtime.model import load

def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what was freed while loading is not held
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("RssAnon:") + 1])

import onnxruntime
before = resident()
model = load(sys.argv[1], check_hashes=False)
session = model.session()
for token in (1, 2, 3):
    session.step([token])
print(resident() - before)
"""


def optimised(path, folder):
    """Nodes and initializers of the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimised.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node], graph.initializer


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("graph", ["decode.onnx", "prefill.onnx"])
def test_every_product_with_weights_is_fused(tmp_path, name, weights, graph):
    config = tiny.CONFIGS[name]
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", QuantizeOptions(weights, group_size=16))
    operators, initializers = optimised(quantized.file(graph), tmp_path)
    assert "DequantizeLinear" not in operators
    floats = [tensor for tensor in initializers if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2]
    assert max(np.prod(tensor.dims) for tensor in floats) < config.hidden_size**2


def test_a_weight_that_is_turned_says_its_zero_point(tmp_path):
    # Before 1.28 ONNX Runtime moves the quantization behind the Transpose, as uint8 if it was not told, and refuses the graph.
    config = tiny.config(tied_embeddings=True)
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", QuantizeOptions("int8"))
    for graph in ("decode.onnx", "prefill.onnx"):
        model = onnx.load(quantized.file(graph), load_external_data=False)
        turned = {node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
        zero_points = {
            node.output[0]: node.input[2]
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and len(node.input) == 3
        }
        name = zero_points["embedding.weight.dequantized"]
        assert "embedding.weight.dequantized" in turned
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        assert not onnx.numpy_helper.to_array(tensor).any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tied", [False, True])
def test_no_float_copy_is_in_memory(tmp_path, tied):
    sizes = {"hidden_size": 512, "ffn_size": 2048, "head_value_dim": 128, "head_key_dim": 128, "vocab_size": 16384}
    config = tiny.config(**sizes, tied_embeddings=tied)
    source = tiny.bundle(tmp_path, config)
    quantized = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int4", group_size=64))
    grown = int(subprocess.run([sys.executable, "-c", MEMORY, quantized.path], check=True, capture_output=True, text=True).stdout)
    # Two sessions, decode and prefill, hold the packed weights each; beside them there is little else.
    assert grown < 2 * quantized.manifest.weights_bytes + 20e6
    assert grown < 0.75 * source.manifest.weights_bytes
