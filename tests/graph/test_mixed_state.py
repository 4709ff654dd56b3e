"""A mixed state: fast heads in float16, slow ones in float32, through export, quantize, sessions, verification and TensorRT."""

import shutil
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.export.convert import convert_bundle
from retnet_export.export.layerwise import logits_by_layer
from retnet_export.export.pipeline import ExportOptions
from retnet_export.quantize.evaluation import _state_error
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime_api import WEIGHTS_FOLDER_OPTION, is_older
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.state import Snapshot, whole_layers
from retnet_export.runtime.model import load

CONFIG = tiny.config(num_heads=8, num_kv_heads=8, head_value_dim=16)  # they remember 32, 64, … tokens; the last two 2,048 and 4,096
SLOW = 2
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 60)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same weights with each kind of state."""
    folders = {state: tmp_path_factory.mktemp(state) for state in ("fp32", "mixed", "fp16")}
    with pytest.warns(UserWarning, match="mixed keeps these in float32"):
        return {state: tiny.bundle(folder, CONFIG, state=state) for state, folder in folders.items()}


def opened(bundle, **options):
    return load(bundle.path, "onnxruntime", threads=1, **options)


def stepped(bundle, tokens=TOKENS):
    """Logits and state after reading token by token with decode.onnx."""
    stream = opened(bundle, low_memory=False).backend.open_stream(1)
    for token in tokens:
        stream.step(np.array([token]))
    return stream.logits().copy(), whole_layers(stream.read_state(0))


def test_fast_heads_are_those_of_a_float16_state_and_slow_ones_those_of_a_float32_state(bundles):
    states = {state: stepped(bundle)[1]["state.0"][0] for state, bundle in bundles.items()}
    np.testing.assert_array_equal(states["mixed"][:-SLOW], states["fp16"][:-SLOW].astype(np.float32))
    np.testing.assert_array_equal(states["mixed"][-SLOW:], states["fp32"][-SLOW:])
    assert (states["fp16"] != states["fp32"]).any((1, 2)).all()


def test_the_logits_are_those_of_a_float32_state_but_for_rounding(bundles):
    exact, mixed = stepped(bundles["fp32"])[0], stepped(bundles["mixed"])[0]
    assert 0 < np.abs(mixed - exact).max() / exact.std() < 5e-3


def test_prefill_leaves_the_state_that_steps_leave(bundles):
    stream = opened(bundles["mixed"], low_memory=False).backend.open_stream(1)
    for part in np.split(TOKENS, [25, 26]):
        stream.prefill(part[None], np.array([len(part)]))
    logits, state = stepped(bundles["mixed"])
    read = whole_layers(stream.read_state(0))
    # Steps round the fast heads once a token, prefill once a chunk; the slow heads of the first layer know of no such rounding.
    for name in ("state.0", "state.1"):
        np.testing.assert_allclose(read[name], state[name], atol=2e-2 * state[name].std())
    np.testing.assert_allclose(read["state.0"][0, -SLOW:], state["state.0"][0, -SLOW:], atol=1e-5 * state["state.0"].std())
    np.testing.assert_array_equal(read["position"], state["position"])
    np.testing.assert_allclose(stream.logits(), logits, atol=2e-2 * logits.std())
    assert set(stream.read_state(0)) == {"position", *(f"state.{layer}.{part}" for layer in range(2) for part in ("fast", "slow"))}


def test_the_manifest_says_what_is_stored(bundles):
    manifest = open_bundle(bundles["mixed"].path).manifest
    elements = CONFIG.state_elements
    assert manifest.precision.state == "mixed"
    assert manifest.state_bytes == 8 + elements * (2 * (8 - SLOW) + 4 * SLOW) // 8
    assert [(spec.input, spec.dtype, spec.shape[1:2]) for spec in manifest.state] == [
        ("position", "int64", ()),
        ("state.0.fast", "float16", (6,)),
        ("state.0.slow", "float32", (2,)),
        ("state.1.fast", "float16", (6,)),
        ("state.1.slow", "float32", (2,)),
    ]


def test_a_session_is_saved_restored_forked_and_batched_like_any_other(bundles, tmp_path):
    session = opened(bundles["mixed"]).session()
    session.feed(TOKENS.tolist())
    session.snapshot().save(tmp_path / "mixed.state")
    later = opened(bundles["mixed"]).session()
    later.restore(Snapshot.load(tmp_path / "mixed.state"))
    expected = list(session.fork().generate_tokens(max_new_tokens=12, temperature=0))
    assert list(later.generate_tokens(max_new_tokens=12, temperature=0)) == expected
    prompts = [TOKENS[:9].tolist(), TOKENS[9:30].tolist(), TOKENS[30:34].tolist()]
    model = opened(bundles["mixed"])
    together = [completion.tokens for completion in model.generate_many(prompts, batch=2, max_new_tokens=6, temperature=0)]
    alone = []
    for prompt in prompts:
        single = model.session()
        single.feed(prompt)
        alone.append(tuple(single.generate_tokens(max_new_tokens=6, temperature=0)))
    assert [tuple(tokens) for tokens in together] == alone
    with pytest.raises(UserError, match=r"lacks the state tensor|has an unknown state tensor"):
        opened(bundles["fp32"]).session().restore(Snapshot.load(tmp_path / "mixed.state"))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantize_mixes_the_state_of_a_float_bundle(bundles, tmp_path, weights):
    options = QuantizeOptions(weights, 16, state="mixed")
    quantized = quantize_bundle(bundles["fp32"], tmp_path / "small.retnet", options)
    again = quantize_bundle(bundles["mixed"], tmp_path / "again.retnet", QuantizeOptions(weights, 16))
    assert open_bundle(quantized.path).manifest.state == open_bundle(again.path).manifest.state == bundles["mixed"].manifest.state
    for (name, array), other in zip(stepped(quantized)[1].items(), stepped(again)[1].values(), strict=True):
        np.testing.assert_allclose(array, other, atol=1e-5 * array.std() if array.ndim == 4 else 0, err_msg=name)


def test_the_distance_of_two_states_is_taken_head_by_head(bundles):
    exact, mixed = (stepped(bundles[state])[1] for state in ("fp32", "mixed"))
    by_head = _state_error(60, mixed, exact).by_head
    assert len(by_head) == 8
    assert max(by_head[-SLOW:]) < 0.5 * min(by_head[:-SLOW])


def test_a_batch_fixed_at_export_keeps_its_size(tmp_path):
    bundle = tiny.bundle(tmp_path, CONFIG, state="mixed", batch=3)
    shapes = {spec.input: spec.shape for spec in bundle.manifest.state}
    assert shapes["state.1.slow"] == (3, SLOW, 8, 16)
    assert opened(bundle).session(3).step([1, 2, 3]).shape == (3, CONFIG.vocab_size)


@pytest.mark.parametrize("graph", ["decode.onnx", "prefill.onnx"])
def test_tensorrt_rtx_builds_it(bundles, graph):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundles["mixed"].file(graph))), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [1 if size == -1 and axis == 0 else 16 if size == -1 else size for axis, size in enumerate(tensor.shape)]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_what_it_does_not_fit_is_refused(bundles, tmp_path):
    with pytest.raises(UserError, match="no head of this model remembers too long for fp16; use --state fp16"):
        tiny.bundle(tmp_path, tiny.config(), state="mixed")
    with pytest.raises(UserError, match="--state mixed needs --dialect portable"):
        ExportOptions(state="mixed", dialect="onnxruntime-cpu")
    with pytest.raises(UserError, match="its state is mixed, and the operators of onnxruntime-cpu take one state a layer"):
        convert_bundle(bundles["mixed"], tmp_path / "cpu.retnet", "onnxruntime-cpu")
    with pytest.raises(UserError, match="its state is mixed already"):
        quantize_bundle(bundles["mixed"], tmp_path / "twice.retnet", QuantizeOptions("int8", state="mixed"))
    (tmp_path / "text.txt").write_text("words " * 100)
    with pytest.raises(UserError, match="give the bundle with a float32 state, and --state mixed here"):
        quantize_bundle(
            bundles["mixed"], tmp_path / "gptq.retnet", QuantizeOptions("int8", method="gptq", calibration=tmp_path / "text.txt")
        )
    assert not list(tmp_path.glob("*.retnet"))


def test_decode_joins_nothing_of_the_states_size(bundles):
    graph = ir.load(bundles["mixed"].file("decode.onnx")).graph
    joined = [node for node in graph if node.op_type == "Concat" and "retention.reads" in node.name]
    assert len(joined) == CONFIG.num_layers
    assert all(value.producer().op_type == "MatMul" for node in joined for value in node.inputs)


def test_the_tensorrt_backend_keeps_both_parts(bundles, tmp_path, monkeypatch):
    tensorrt_double = pytest.importorskip("tensorrt_double")
    from retnet_export.export.tensorrt import CompileOptions, compile_bundle

    copy = tmp_path / "mixed.retnet"
    shutil.copytree(bundles["mixed"].path, copy)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    tensorrt_double.install(monkeypatch)
    bundle = open_bundle(copy)
    compile_bundle(bundle, CompileOptions(max_batch=2))
    stream = load(copy, "tensorrt").backend.open_stream(1)
    for token in TOKENS:
        stream.step(np.array([token]))
    logits, state = stepped(bundles["mixed"])
    np.testing.assert_allclose(stream.logits(), logits, atol=2e-2 * logits.std())
    np.testing.assert_allclose(whole_layers(stream.read_state(0))["state.1"], state["state.1"], atol=2e-2 * state["state.1"].std())


@pytest.mark.skipif(is_older(onnxruntime.__version__, WEIGHTS_FOLDER_OPTION), reason="layer by layer needs ONNX Runtime 1.21")
@pytest.mark.parametrize("graph", ["decode", "prefill"])
def test_a_graph_run_layer_by_layer_carries_both_parts(bundles, graph):
    logits = logits_by_layer(bundles["mixed"], graph, TOKENS[:40])
    expected = stepped(bundles["mixed"], TOKENS[:40])[0]
    np.testing.assert_allclose(logits[-1:], expected, atol=2e-2 * expected.std())
