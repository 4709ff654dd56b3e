"""A portable bundle rewritten for one runtime: the same integers, the same answers, nothing lost on the way."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.export.convert import convert_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime_api import is_older
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

pytestmark = pytest.mark.skipif(
    is_older(onnxruntime.__version__, (1, 32)), reason="ONNX Runtime before 1.32 lacks these operators on the CPU"
)
CONFIG = tiny.config(vocab_size=64, hidden_size=64, num_heads=2, num_kv_heads=2, head_key_dim=64, head_value_dim=128, ffn_size=128)
TIED = tiny.config(
    vocab_size=64,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=2,
    head_key_dim=64,
    head_value_dim=128,
    ffn_size=128,
    tied_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, 64, 12)


def logits(bundle):
    stream = load(bundle.path, "onnxruntime", check_hashes=False).backend.open_stream(1)
    rows = []
    for token in TOKENS:
        stream.step(np.array([token]))
        rows.append(stream.logits()[0].copy())
    stream.prefill(TOKENS[None], np.array([len(TOKENS)]))
    return np.stack([*rows, stream.logits()[0]])


def operators(bundle, graph="decode"):
    return [node.op_type for node in ir.load(bundle.file(f"{graph}.onnx")).graph]


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied head"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dialect", ["onnxruntime-cpu", "onnxruntime-cuda"])
def test_a_quantized_bundle_answers_the_same_in_another_dialect(tmp_path, config, weights, dialect):
    portable = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "q.retnet", QuantizeOptions(weights))
    converted = convert_bundle(portable, tmp_path / "c.retnet", dialect)
    assert open_bundle(converted.path).manifest.dialect == dialect  # with its hashes
    error = measure(logits(converted), logits(portable))
    assert error.relative < TOLERANCES["onnxruntime-quantized"].relative


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied head"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_for_cuda_every_product_is_one_operator_over_the_integers(tmp_path, config, weights):
    portable = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "q.retnet", QuantizeOptions(weights))
    converted = convert_bundle(portable, tmp_path / "c.retnet", "onnxruntime-cuda")
    for graph in ("decode", "prefill"):
        found = operators(converted, graph)
        assert "DequantizeLinear" not in found
        assert found.count("MatMulNBits") == 4 * config.num_layers + 1
    model = ir.load(converted.file("decode.onnx"))
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_for_the_cpu_the_weights_are_the_same_file(tmp_path):
    portable = quantize_bundle(tiny.bundle(tmp_path, TIED), tmp_path / "q.retnet", QuantizeOptions("int8"))
    converted = convert_bundle(portable, tmp_path / "c.retnet", "onnxruntime-cpu")
    assert converted.manifest.files["weights.bin"] == portable.manifest.files["weights.bin"]
    assert converted.manifest.quantization == portable.manifest.quantization
    assert operators(converted).count("LinearAttention") == TIED.num_layers


def test_a_float_bundle_is_exact_in_either_dialect(tmp_path):
    portable = tiny.bundle(tmp_path, CONFIG)
    for dialect in ("onnxruntime-cpu", "onnxruntime-cuda"):
        converted = convert_bundle(portable, tmp_path / f"{dialect}.retnet", dialect)
        assert measure(logits(converted), logits(portable)).relative < TOLERANCES["onnxruntime-float32"].relative


def test_only_a_portable_bundle_is_converted(tmp_path):
    portable = tiny.bundle(tmp_path, CONFIG)
    converted = convert_bundle(portable, tmp_path / "c.retnet", "onnxruntime-cpu")
    with pytest.raises(UserError, match=r"in the onnxruntime-cpu dialect already; give the portable bundle .* without --dialect"):
        convert_bundle(converted, tmp_path / "d.retnet", "onnxruntime-cuda")
    with pytest.raises(UserError, match="quantize the portable bundle, then convert the result"):
        quantize_bundle(converted, tmp_path / "d.retnet", QuantizeOptions("int8"))
    with pytest.raises(UserError, match="--dialect is 'tensorrt', expected onnxruntime-cpu or onnxruntime-cuda"):
        convert_bundle(portable, tmp_path / "d.retnet", "tensorrt")
    with pytest.raises(UserError, match="the output is the input"):
        convert_bundle(portable, portable.path, "onnxruntime-cpu", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.retnet", "tiny.retnet"]
