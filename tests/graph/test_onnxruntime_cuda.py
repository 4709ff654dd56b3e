"""The variant `onnxruntime-cuda` against the portable graph, on the CPU, which has kernels for the same operators.

What it does on a GPU is shown in tests/gpu.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from retnet_export.graph.builder import GraphBuilder
from retnet_export.graph.decode import build_decode
from retnet_export.graph.prefill import build_prefill
from retnet_export.graph.variants import FORMS, rewrite
from retnet_export.graph.variants.products import pack_blocks
from retnet_export.graph.weights import random_weights
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.numerics import measure, tolerance

pytestmark = pytest.mark.skipif(
    not hasattr(onnxruntime, "__version__") or tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32),
    reason="ONNX Runtime before 1.32 has no CPU kernel of GatedDeltaNet",
)
SMALL = {"vocab_size": 200, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "head_value_dim": 128, "ffn_size": 128}
CONFIGS = {
    "plain": ModelConfig(**SMALL, head_key_dim=64, num_kv_heads=2),
    "no gate, no norm weight": ModelConfig(**SMALL, head_key_dim=64, num_kv_heads=2, output_gate=False, head_norm_affine="none"),
    "shared keys": ModelConfig(**SMALL, head_key_dim=64, num_kv_heads=1),
    "torchscale": ModelConfig(
        **SMALL, head_key_dim=64, num_kv_heads=2, rotary_layout="interleaved", score_norm=True, head_norm_affine="none"
    ),
    "layer norms, biases, GELU": ModelConfig(
        **SMALL, head_key_dim=64, num_kv_heads=2, norm="layer", retention_bias=True, ffn="mlp", ffn_activation="gelu", ffn_bias=True
    ),
    "post-norm": ModelConfig(**SMALL, head_key_dim=64, num_kv_heads=2, post_norm=True, residual_scale=1.4, final_norm=False),
    "a key size without a kernel": ModelConfig(**SMALL, head_key_dim=32, num_kv_heads=2),
}


def run(folder, config, weights, compute, variant, tokens):
    """Logits after each token, (T, B, V), by steps; and by prefill, from the last to the first, (B, T, V)."""
    folder.mkdir()
    models = {}
    with WeightsFile(folder / "weights.bin") as file:
        for name, build in (("decode", build_decode), ("prefill", build_prefill)):
            passes = FORMS[variant].passes if variant in FORMS else ()
            models[name] = rewrite(build(config, weights.__getitem__, file, compute), passes)
            ir.save(models[name], folder / f"{name}.onnx")
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"]) for name in models
    }
    batch = tokens.shape[1]

    def initial(session):
        return {
            each.name: np.zeros([batch if not isinstance(size, int) else size for size in each.shape], np.float32)
            for each in session.get_inputs()
            if each.name.startswith("state.")
        } | {"position": np.zeros(batch, np.int64)}

    state, rows = initial(sessions["decode"]), []
    for row in tokens:
        names = [each.name for each in sessions["decode"].get_outputs()]
        results = dict(zip(names, sessions["decode"].run(None, {"tokens": row[:, None], **state}), strict=True))
        state = {name: results[f"{name}_out"] for name in state}
        rows.append(results["logits"])
    chunk = {"tokens": np.ascontiguousarray(tokens.T), "length": np.full(batch, len(tokens)), **initial(sessions["prefill"])}
    chunk["length"] //= 2  # the rest are drafts
    chunk["rows"] = np.tile(np.arange(len(tokens))[::-1], (batch, 1))
    return np.stack(rows), sessions["prefill"].run(["logits"], chunk)[0], models


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_the_variant_gives_the_portable_graphs_logits(tmp_path, name, compute):
    config = CONFIGS[name]
    weights = random_weights(config, seed=3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (9, 3))
    portable, special = (run(tmp_path / each, config, weights, compute, each, tokens) for each in ("portable", "onnxruntime-cuda"))
    for expected, actual in zip(portable[:2], special[:2], strict=True):
        assert measure(actual, expected).relative < tolerance(compute, "onnxruntime-cuda").relative


def test_a_step_of_a_layer_is_fifteen_kernels(tmp_path):
    config = CONFIGS["plain"]
    _, _, models = run(tmp_path / "d", config, random_weights(config), "float16", "onnxruntime-cuda", np.zeros((1, 1), np.int64))
    layer = [node.op_type for node in models["decode"].graph if (node.name or "").startswith("layers.1.")]
    kernels = sorted(kind for kind in layer if kind not in ("Reshape", "Squeeze", "Unsqueeze"))
    fused = ["GatedDeltaNet", "GatedRMSNorm", "QuickGelu", "RotaryEmbedding", "SkipSimplifiedLayerNormalization"]
    assert set(fused) <= set(kernels)
    assert "Cast" not in kernels
    assert len(kernels) == 15, kernels


def test_the_state_is_value_major_in_both_graphs(tmp_path):
    config = CONFIGS["plain"]
    _, _, models = run(tmp_path / "d", config, random_weights(config), "float32", "onnxruntime-cuda", np.zeros((1, 1), np.int64))
    for model in models.values():
        shapes = {
            value.name: tuple(value.shape)[1:] for value in (*model.graph.inputs, *model.graph.outputs) if "state." in value.name
        }
        assert set(shapes.values()) == {(2, 128, 64)}


def test_the_largest_logits_are_outputs(tmp_path):
    config = CONFIGS["plain"]
    _, _, models = run(tmp_path / "d", config, random_weights(config), "float32", "onnxruntime-cuda", np.zeros((1, 1), np.int64))
    names = [value.name for value in models["decode"].graph.outputs]
    assert names[0] == "logits"
    assert names[-2:] == ["top_logits", "top_tokens"]


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_shows_among_the_largest_of_its_row_alone(tmp_path, strange):
    b = GraphBuilder("logits", 21)
    value = b.input("x", ir.DataType.FLOAT, (2, 300))
    b.output(b.op("Identity", value, name="y"), "logits", ir.DataType.FLOAT, (2, 300))
    from retnet_export.graph.variants.top import TOP, TopLogitsPass

    ir.save(rewrite(b.model("test"), (TopLogitsPass,)), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    x[1, 299] = strange
    _, values, tokens = session.run(None, {"x": x})
    assert np.isnan(values[1]).all()
    np.testing.assert_array_equal(tokens[0], np.argsort(-x[0])[:TOP])
    np.testing.assert_array_equal(values[0], x[0, tokens[0]])


@pytest.mark.parametrize(("dtype", "bits"), [(ir.DataType.INT4, 4), (ir.DataType.INT8, 8)])
def test_quantized_products_become_matmul_nbits(tmp_path, dtype, bits):
    random = np.random.default_rng(0)
    limit = 1 << (bits - 1)
    weight = random.integers(-limit, limit, (64, 32)).astype(np.int8)
    scale = random.uniform(0.01, 0.02, (2, 32)).astype(np.float32)
    x = random.standard_normal((3, 64)).astype(np.float32)

    b = GraphBuilder("product", 21)
    value = b.input("x", ir.DataType.FLOAT, (3, 64))
    stored = b.initializer(ir.tensor(weight.astype(dtype.numpy()), dtype=dtype, name="w"))
    wide = b.op("DequantizeLinear", stored, b.constant(scale, "scale"), name="wide", axis=0, block_size=32)
    b.output(b.op("MatMul", value, wide, name="y"), "y", ir.DataType.FLOAT, (3, 32))
    from retnet_export.graph.variants.products import MatMulNBitsPass

    model = rewrite(b.model("test"), (MatMulNBitsPass,))
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    expected = x @ (weight * np.repeat(scale, 32, 0))
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


def test_four_bit_weights_are_packed_low_half_first():
    packed = pack_blocks(np.arange(-8, 8, dtype=np.int8).repeat(2).reshape(32, 1), 32, 4)
    assert packed.shape == (1, 1, 16)
    np.testing.assert_array_equal(packed[0, 0], np.arange(16) * 17)


def test_a_variant_that_nobody_can_make_is_refused():
    from retnet_export.export.pipeline import ExportOptions
    from retnet_export.runtime.errors import UserError

    with pytest.raises(UserError, match="variants is 'cuda', expected onnxruntime-cuda"):
        ExportOptions(variants=("cuda",))
