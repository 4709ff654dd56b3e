"""The backend `onnxruntime-cuda` on a GPU: what it computes, where it keeps it, and that CUDA graphs change nothing."""

from dataclasses import replace

import numpy as np
import oracle
import pytest

from retnet_export.graph.decode import build_decode
from retnet_export.graph.prefill import build_prefill
from retnet_export.graph.retnet import graph_spec
from retnet_export.graph.variants import ONNXRUNTIME_CUDA, rewrite
from retnet_export.graph.weights import random_weights
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import FORMAT_VERSION, PORTABLE, Manifest, Precision, Variant, state_specs
from retnet_export.runtime.numerics import measure, tolerance

pytestmark = pytest.mark.usefixtures("onnxruntime_cuda")
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=128, num_layers=3, num_heads=2, head_key_dim=64, head_value_dim=128, ffn_size=256, num_kv_heads=2
)
WEIGHTS = random_weights(CONFIG, seed=1)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 24))


def make(folder, compute="float32", special=True, state="float32", config=CONFIG, weights=WEIGHTS):
    import onnx_ir as ir

    folder.mkdir(exist_ok=True)
    graphs = {}
    with WeightsFile(folder / "weights.bin") as file:
        for name, build, chunk in (("decode", build_decode, 1), ("prefill", build_prefill, 16)):
            model = rewrite(build(config, weights.__getitem__, file, compute, state), ONNXRUNTIME_CUDA if special else ())
            ir.save(model, folder / f"{name}.onnx")
            graphs[name] = graph_spec(model, f"{name}.onnx", chunk)
    specs = state_specs(config, state)
    precision = Precision(compute, compute, state)
    variants = {PORTABLE: Variant(graphs)}
    return Bundle(folder, Manifest("retnet-export bundle", FORMAT_VERSION, "t", config, precision, variants, specs, {}))


def opened(bundle, **options):
    from retnet_export.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(bundle, **options)


def steps(stream, tokens):
    rows = []
    for column in tokens.T:
        stream.step(column)
        rows.append(stream.logits().copy())
    return np.stack(rows, 1)  # (B, T, V)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_steps_agree_with_the_oracle(tmp_path, compute, special):
    logits = steps(opened(make(tmp_path, compute, special)).open_stream(3), TOKENS)
    expected = np.stack([oracle.logits(CONFIG, WEIGHTS, row) for row in TOKENS])
    assert measure(logits, expected).relative < tolerance(compute, "onnxruntime-cuda").relative


def test_cuda_graphs_change_no_bit(tmp_path):
    bundle = make(tmp_path, "float16")
    with_graphs, without = (steps(opened(bundle, graphs=graphs).open_stream(3), TOKENS) for graphs in (True, False))
    np.testing.assert_array_equal(with_graphs, without)


def test_two_streams_of_one_backend_do_not_disturb_each_other(tmp_path):
    backend = opened(make(tmp_path))
    first, second = backend.open_stream(1), backend.open_stream(2)
    a, b = [], []
    for column in TOKENS.T:
        first.step(column[:1])
        second.step(column[1:])
        a.append(first.logits().copy())
        b.append(second.logits().copy())
    together = steps(backend.open_stream(3), TOKENS)
    np.testing.assert_allclose(np.concatenate([np.stack(a, 1), np.stack(b, 1)]), together, atol=1e-4)


def test_models_of_one_process_take_turns_on_one_stream(tmp_path):
    """Work on a second stream would slow the steps on both (docs/lab)."""
    first, second = (opened(make(tmp_path / name)) for name in ("a", "b"))
    assert first._stream is second._stream
    streams, rows = (first.open_stream(3), second.open_stream(3)), ([], [])
    for column in TOKENS.T:
        for stream, logits in zip(streams, rows, strict=True):
            stream.step(column)
            logits.append(stream.logits().copy())
    np.testing.assert_array_equal(rows[0], rows[1])


def test_prefill_gives_what_steps_give_and_padding_leaves_no_trace(tmp_path):
    backend = opened(make(tmp_path))
    lengths = np.array([16, 9, 1])
    read = backend.open_stream(3)
    read.prefill(TOKENS[:, :16], lengths)
    for slot, length in enumerate(lengths):
        stepped = backend.open_stream(1)
        expected = steps(stepped, TOKENS[slot : slot + 1, :length])[0, -1]
        assert measure(read.logits()[slot], expected).relative < tolerance("float32", "onnxruntime-cuda").relative
        for name, array in stepped.read_state(0).items():
            np.testing.assert_allclose(read.read_state(slot)[name], array, atol=1e-4)


def test_a_snapshot_restored_in_another_slot_continues_the_same_text(tmp_path):
    backend = opened(make(tmp_path))
    stream = backend.open_stream(1)
    steps(stream, TOKENS[:1, :10])
    snapshot = stream.read_state(0)
    expected = steps(stream, TOKENS[:1, 10:])
    other = backend.open_stream(3)
    steps(other, TOKENS[:, :3])
    other.write_state(2, snapshot)
    continued = steps(other, np.repeat(TOKENS[:1, 10:], 3, 0))[2]
    np.testing.assert_allclose(continued, expected[0], atol=1e-4)


def test_the_largest_logits_are_chosen_on_the_device(tmp_path):
    stream = opened(make(tmp_path)).open_stream(3)
    for column in TOKENS.T[:4]:
        stream.step(column)
        tokens, values = stream.top(5)
        order = np.argsort(-stream.logits(), axis=-1)[:, :5]
        np.testing.assert_array_equal(tokens, order)
        np.testing.assert_array_equal(values, np.take_along_axis(stream.logits(), order, -1))
    assert stream.top(100)[0].shape == (3, 100)


def with_head(**rows):
    """The weights, with rows of the output head replaced: those of token n by argument `tn`."""
    head = WEIGHTS["head.weight"].copy()
    for name, row in rows.items():
        head[int(name[1:])] = row
    return {**WEIGHTS, "head.weight": head}


@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_equal_logits_come_in_the_order_of_their_tokens(tmp_path, vocab_size):
    """Its kernels for short rows and for long ones keep different orders."""
    config = replace(CONFIG, vocab_size=vocab_size)
    weights = random_weights(config, seed=1)
    pattern = np.random.default_rng(0).permutation(vocab_size) // 3  # each row of the head three times
    weights = {**weights, "head.weight": weights["head.weight"][pattern]}
    stream = opened(make(tmp_path, config=config, weights=weights)).open_stream(3)
    for column in TOKENS.T[:4]:
        stream.step(column)
        for k in (1, 2, 5, 62, 63, 64, 65):
            tokens, values = stream.top(k)
            expected = top_of(stream.logits(), k)
            np.testing.assert_array_equal(tokens, expected[0])
            np.testing.assert_array_equal(values, expected[1])


@pytest.mark.parametrize("token", [0, 150, 299])
@pytest.mark.parametrize("k", [1, 5, 64, 100])
def test_a_nan_among_the_logits_is_the_largest(tmp_path, token, k):
    stream = opened(make(tmp_path, weights=with_head(**{f"t{token}": np.nan}))).open_stream(2)
    stream.step(TOKENS[:2, 0])
    tokens, values = stream.top(k)
    assert tokens[:, 0].tolist() == [token, token]
    assert np.isnan(values[:, 0]).all()
    assert np.isfinite(values[:, 1:]).all()


def test_the_state_is_that_of_the_portable_graph(tmp_path):
    states = []
    for special in (False, True):
        stream = opened(make(tmp_path / str(special), special=special)).open_stream(1)
        steps(stream, TOKENS[:1])
        states.append(stream.read_state(0))
    for name, array in states[0].items():
        np.testing.assert_allclose(states[1][name], array, atol=1e-4)


def test_sums_over_wide_rows_and_key_dims_of_256_stay_within_rounding(tmp_path):
    """Accumulating 4,096 terms in float16 would show; so would a kernel for Dk = 256 that differs from those for 64."""
    config = ModelConfig(
        vocab_size=512,
        hidden_size=2048,
        num_layers=2,
        num_heads=8,
        head_key_dim=256,
        head_value_dim=512,
        ffn_size=4096,
        num_kv_heads=8,
    )
    weights = random_weights(config, seed=2)
    rows = []
    for compute, special in (("float32", False), ("float16", True)):
        stream = opened(make(tmp_path / str(special), compute, special, config=config, weights=weights)).open_stream(2)
        rows.append(steps(stream, TOKENS[:2]))
    error = measure(rows[1], rows[0])
    print(error)
    assert error.relative < tolerance("float16", "onnxruntime-cuda").relative
