"""Prefill equals single steps: any length, any split, any mix of lengths in a batch, any padding."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import oracle
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights

from retnet_export.graph.decode import build_decode
from retnet_export.graph.prefill import build_prefill
from retnet_export.graph.states import store_states_as_float16
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.backends.onnxruntime_api import best_variant
from retnet_export.runtime.model import Model, load
from retnet_export.runtime.numerics import TOLERANCES, measure

CHUNK = 20  # more than the few tokens that have a form of their own
LONGEST = 3 * CHUNK
TOKENS = np.random.default_rng(1).integers(0, 50, LONGEST, dtype=np.int64)
TOLERANCE = TOLERANCES["chunkwise-float32"].relative
AS_ORACLE = TOLERANCES["onnxruntime-float32"].relative


@pytest.fixture(scope="module", params=itertools.product(tiny.CONFIGS, ("portable", "onnxruntime-cpu")), ids=" as ".join)
def model(request, tmp_path_factory) -> Model:
    """Every family in both variants for a CPU; two sessions, so that steps are those of decode.onnx."""
    family, variant = request.param
    bundle = tiny.bundle(tmp_path_factory.mktemp("bundle"), tiny.CONFIGS[family], chunk=CHUNK)
    if variant not in bundle.manifest.variants or (variant != "portable" and best_variant(bundle.manifest, "cpu") != variant):
        pytest.skip(f"this ONNX Runtime does not run {variant}")
    return Model(bundle, OnnxRuntimeBackend(bundle, threads=1, low_memory=False, variant=variant))


@pytest.fixture(scope="module")
def stepped(model) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Logits and state after 0, 1, 2, … single steps."""
    runner = model.backend.open_runner(1)
    after = [(np.zeros(50, np.float32), runner.read_state(0))]
    for token in TOKENS:
        runner.step(np.array([token]))
        after.append((runner.logits()[0].copy(), runner.read_state(0)))
    return after


@pytest.fixture(scope="module")
def reference(model) -> np.ndarray:
    """The oracle's logits after each token."""
    config = model.bundle.manifest.model
    return oracle.logits(config, random_weights(config), TOKENS)


def assert_same(runner, slot, expected) -> None:
    logits, state = expected
    assert measure(runner.logits()[slot], logits).relative < TOLERANCE
    assert_same_state(runner, slot, state)


def assert_same_state(runner, slot, state) -> None:
    for name, value in runner.read_state(slot).items():
        if name == "position":
            assert value == state[name]
        elif state[name].any():
            assert measure(value, state[name]).relative < TOLERANCE
        else:
            assert not value.any()


def test_every_family_reads_a_prompt_as_the_oracle_does(model, reference):
    for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, LONGEST):
        session = model.session()
        session.feed(TOKENS[:length].tolist())
        assert measure(session.logits[0], reference[length - 1]).relative < AS_ORACLE


@settings(deadline=None, max_examples=25)
@given(data=st.data(), batch=st.integers(1, 3))
def test_any_rows_of_any_split_are_those_of_the_oracle_and_drafts_leave_no_trace(model, reference, stepped, data, batch):
    """Chunks of tokens taken in, drafts and padding, in any mix; drafts right and wrong ones."""
    runner = model.backend.open_runner(batch)
    read = [0] * batch
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.integers(1, CHUNK))
        lengths = np.array([data.draw(st.integers(0, width)) for _ in range(batch)])
        wanted = data.draw(st.integers(1, width))
        rows = np.array([[data.draw(st.integers(0, width - 1)) for _ in range(wanted)] for _ in range(batch)])
        tokens = np.array([TOKENS[start : start + width] for start in read])
        wrong = [data.draw(st.integers(length, width)) for length in lengths]  # from here on drafts are wrong, or padding
        for slot, start in enumerate(wrong):
            tokens[slot, start:] = data.draw(st.sampled_from([0, 49, -7, 50, 2**62]))
        logits = runner.score(tokens, lengths, rows)
        assert logits.shape == (batch, wanted, 50)
        for slot in range(batch):
            for column, row in enumerate(rows[slot]):
                if row < wrong[slot]:
                    assert measure(logits[slot, column], reference[read[slot] + row]).relative < AS_ORACLE
            read[slot] += int(lengths[slot])
            assert_same_state(runner, slot, stepped[read[slot]][1])


@settings(deadline=None, max_examples=20)
@given(length=st.integers(0, CHUNK - 1), drafts=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=CHUNK))
def test_the_state_is_the_same_bit_by_bit_whatever_the_drafts_are(model, length, drafts):
    states = []
    for tail in (drafts, [0] * len(drafts)):
        runner = model.backend.open_runner(1)
        runner.step(TOKENS[:1])
        tokens = np.array([*TOKENS[1 : 1 + length], *tail], np.int64)[None, :CHUNK]
        runner.score(tokens, np.array([length]), np.array([[tokens.shape[1] - 1]]))
        states.append(runner.read_state(0))
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_score_that_is_undone_leaves_the_state_bit_by_bit(model):
    runner, undone = model.backend.open_runner(2), model.backend.open_runner(2)
    for each in (runner, undone):
        each.prefill(np.stack([TOKENS[:7], TOKENS[3:10]]), np.array([7, 4]))
        each.step(TOKENS[:2])  # which may write the state where it was read
    undone.score_on_trial(np.stack([TOKENS[:6]] * 2), np.array([6, 3]), np.array([[5], [5]]))
    undone.undo()
    for each in (runner, undone):
        each.step(TOKENS[5:7])
        each.prefill(TOKENS[:6].reshape(2, 3), np.array([3, 1]))
    np.testing.assert_array_equal(undone.logits(), runner.logits())
    for slot in range(2):
        for name, value in runner.read_state(slot).items():
            np.testing.assert_array_equal(undone.read_state(slot)[name], value)


def test_a_step_after_a_score_continues_from_the_accepted_tokens(model, stepped):
    runner = model.backend.open_runner(1)
    runner.score(TOKENS[None, :9], np.array([5]), np.array([[4, 8]]))
    runner.step(TOKENS[5:6])
    assert_same(runner, 0, stepped[6])


@settings(deadline=None, max_examples=20)
@given(splits=st.lists(st.tuples(st.integers(0, CHUNK), st.integers(0, 3)), min_size=1, max_size=3))
def test_any_split_into_chunks_is_as_many_steps(model, stepped, splits):
    runner = model.backend.open_runner(1)
    read = 0
    for length, padding in splits:
        row = np.zeros((1, max(1, min(length + padding, CHUNK))), np.int64)
        row[0, :length] = TOKENS[read : read + length]
        runner.prefill(row, np.array([length]))
        read += length
        if length:
            assert_same(runner, 0, stepped[read])
        else:
            assert_same_state(runner, 0, stepped[read][1])


@settings(deadline=None, max_examples=20)
@given(data=st.data(), batch=st.integers(1, 4))
def test_a_batch_of_any_lengths_is_its_single_runs(model, stepped, data, batch):
    runner = model.backend.open_runner(batch)
    read = np.zeros(batch, np.int64)
    for _ in range(2):
        lengths = np.array(data.draw(st.lists(st.integers(0, CHUNK), min_size=batch, max_size=batch)))
        rows = np.zeros((batch, CHUNK), np.int64)
        for slot, length in enumerate(lengths):
            rows[slot, :length] = TOKENS[read[slot] : read[slot] + length]
        runner.prefill(rows, lengths)
        read += lengths
        for slot in range(batch):
            if lengths[slot]:
                assert_same(runner, slot, stepped[read[slot]])
            else:
                assert_same_state(runner, slot, stepped[read[slot]][1])


@settings(deadline=None, max_examples=20)
@given(length=st.integers(0, CHUNK), poison=st.integers(-(2**63), 2**63 - 1))
def test_padding_leaves_no_trace_whatever_it_holds(model, length, poison):
    results = []
    for filler in (0, poison):
        runner = model.backend.open_runner(2)
        runner.step(TOKENS[:2])
        rows = np.full((2, CHUNK), filler)
        rows[0, :length], rows[1] = TOKENS[:length], TOKENS[:CHUNK]
        runner.prefill(rows, np.array([length, CHUNK]))
        results.append((runner.logits()[0].copy(), runner.read_state(0)))
    (clean, clean_state), (poisoned, poisoned_state) = results
    assert length == 0 or np.array_equal(clean, poisoned)  # after no tokens they are undefined
    assert all(np.array_equal(clean_state[name], poisoned_state[name]) for name in clean_state)


def test_a_sequence_of_no_tokens_keeps_its_state_bit_by_bit(model):
    runner = model.backend.open_runner(2)
    runner.prefill(np.stack([TOKENS[:CHUNK]] * 2), np.array([CHUNK, CHUNK]))
    before = runner.read_state(0)
    runner.prefill(np.stack([TOKENS[:CHUNK]] * 2), np.array([0, 5]))
    after = runner.read_state(0)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_prefill_continues_past_position_two_to_the_31(model):
    start = model.backend.open_runner(1).read_state(0) | {"position": np.array([2**31 - 5])}
    chunked, stepped = (model.backend.open_runner(1) for _ in range(2))
    for runner in (chunked, stepped):
        runner.write_state(0, start)
    chunked.prefill(TOKENS[None, :CHUNK], np.array([CHUNK]))
    for token in TOKENS[:CHUNK]:
        stepped.step(np.array([token]))
    assert chunked.read_state(0)["position"] == 2**31 - 5 + CHUNK
    assert_same(chunked, 0, (stepped.logits()[0], stepped.read_state(0)))


def test_both_graphs_share_one_copy_of_the_weights(tmp_path):
    config = tiny.config()
    weights = random_weights(config)
    path = tmp_path / "weights.bin"
    with WeightsFile(path) as file:
        build_decode(config, weights.__getitem__, file, "float32")
        size = path.stat().st_size
        build_prefill(config, weights.__getitem__, file, "float32")
    assert path.stat().st_size == size


@pytest.mark.parametrize(("precision", "state"), [("fp16", "fp32"), ("fp32", "fp16"), ("fp16", "fp16")])
def test_reduced_precision_prefill_is_as_many_steps(tmp_path, precision, state):
    tiny.bundle(tmp_path, tiny.config(), precision=precision, state=state, chunk=CHUNK)
    model = load(tmp_path / "tiny.retnet", "onnxruntime", threads=1)
    chunked, stepped = (model.backend.open_runner(1) for _ in range(2))
    chunked.prefill(TOKENS[None, :CHUNK], np.array([CHUNK]))
    for token in TOKENS[:CHUNK]:
        stepped.step(np.array([token]))
    # A float16 state is rounded after every step, but only once a chunk.
    assert measure(chunked.logits(), stepped.logits()).relative < TOLERANCES["onnxruntime-float16"].relative


@pytest.mark.parametrize(("compute", "state"), [("float32", "float32"), ("float16", "float16")])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_tensorrt_builds_it_for_any_chunk_and_batch(tmp_path, family, compute, state):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    config = tiny.CONFIGS[family]
    with WeightsFile(tmp_path / "weights.bin") as file:
        model = build_prefill(config, random_weights(config).__getitem__, file, compute)
        if state == "float16":
            store_states_as_float16(model)
        ir.save(model, tmp_path / "prefill.onnx")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "prefill.onnx")), parser.get_error(0)
    options = builder.create_builder_config()
    targets = (trt.ComputeCapability.SM86, trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)
    options.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        options.set_compute_capability(target, index)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        chunk = [(1,), (CHUNK,), (4 * CHUNK,)] if tensor.name in ("tokens", "rows") else [tuple(tensor.shape)[1:]] * 3
        profile.set_shape(tensor.name, *((batch, *rest) for batch, rest in zip((1, 1, 4), chunk, strict=True)))
    options.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, options) is not None
