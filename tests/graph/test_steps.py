"""The prefill graph for CPUs reads few tokens by one operator over the state, many in chunks, and writes the state in place."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.backends.onnxruntime_api import FUSES_INTEGERS, is_older
from retnet_export.runtime.numerics import TOLERANCES, measure

pytestmark = pytest.mark.skipif(
    is_older(onnxruntime.__version__, FUSES_INTEGERS), reason="ONNX Runtime before 1.25 has no LinearAttention"
)
# Two blocks a head.
WIDE = tiny.config(num_heads=3, num_kv_heads=1, head_key_dim=64, head_value_dim=256, hidden_size=192)
CONFIGS = {**tiny.CONFIGS, "two blocks a head": WIDE}
SAME = TOLERANCES["onnxruntime-float32"].relative


def runners(bundle, batch):
    """One session for everything, and a session a graph of the portable graphs."""
    shared = OnnxRuntimeBackend(bundle, variant="onnxruntime-cpu")
    return shared.open_runner(batch), OnnxRuntimeBackend(bundle, variant="portable", low_memory=False).open_runner(batch)


def agree(ours, theirs, slots):
    for slot in slots:
        for name, expected in theirs.read_state(slot).items():
            found = ours.read_state(slot)[name]
            assert measure(found, expected).relative < SAME if name != "position" else (found == expected).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_and_chunks_of_any_lengths_agree_with_the_portable_graphs(tmp_path, name):
    ours, theirs = runners(tiny.bundle(tmp_path, CONFIGS[name], chunk=24), 3)
    random = np.random.default_rng(0)
    lengths = [(1, 1, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1), (6, 1, 0), (2, 2, 2), (24, 17, 0), (17, 17, 17), (16, 16, 16), (1, 1, 1)]
    for length in lengths:
        tokens = random.integers(0, 50, (3, max(length) or 1))
        for runner in (ours, theirs):
            runner.prefill(tokens, np.array(length))
        agree(ours, theirs, range(3))
        real = [slot for slot in range(3) if length[slot]]
        if real:
            assert measure(ours.logits()[real], theirs.logits()[real]).relative < SAME
        for runner in (ours, theirs):
            runner.step(tokens[:, 0])
        agree(ours, theirs, range(3))
        assert measure(ours.logits(), theirs.logits()).relative < SAME


def test_a_draft_of_one_token_leaves_no_trace(tmp_path):
    ours, theirs = runners(tiny.bundle(tmp_path, WIDE, chunk=6), 1)
    for runner in (ours, theirs):
        runner.prefill(np.array([[3, 1, 4]]), np.array([3]))
    before = ours.read_state(0)
    rows = [runner.score(np.array([[9]]), np.array([0]), np.array([[0]])) for runner in (ours, theirs)]
    assert measure(rows[0], rows[1]).relative < SAME
    for name, array in ours.read_state(0).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 24])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_may_write_the_state_where_it_reads_it(tmp_path, name, tokens):
    """The same bits come out as with the state written elsewhere, whatever form reads the tokens, drafts included."""
    bundle = tiny.bundle(tmp_path, CONFIGS[name], chunk=24)
    graph = bundle.manifest.variants["onnxruntime-cpu"].graphs["prefill"]
    session = onnxruntime.InferenceSession(bundle.file(graph.file), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    inputs = {
        spec.name: random.standard_normal([2 if size < 0 else size for size in spec.shape]).astype(np.float32)
        for spec in graph.inputs
        if spec.name.startswith("state.")
    }
    inputs |= {"tokens": random.integers(0, 50, (2, tokens)), "position": np.array([0, 7])}
    inputs["rows"] = np.tile(np.arange(tokens), (2, 1))
    names = [spec.name for spec in graph.outputs]
    for lengths in ([tokens, tokens], [tokens // 2, tokens], [0, 1]):
        inputs["length"] = np.array(lengths)
        apart = dict(zip(names, session.run(names, inputs), strict=True))
        held = {key: value.copy() for key, value in inputs.items()}
        binding = session.io_binding()
        binding.bind_output("logits")
        binding.bind_output("position_out")
        for key, value in held.items():
            binding.bind_input(key, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            if key.startswith("state."):
                binding.bind_output(f"{key}_out", "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), apart["logits"])
        for key, value in held.items():
            if key.startswith("state."):
                np.testing.assert_array_equal(value, apart[f"{key}_out"])


def test_weights_are_outside_the_branches_and_the_state_is_held_once(tmp_path):
    bundle = quantize_bundle(tiny.bundle(tmp_path, WIDE), tmp_path / "q.retnet", QuantizeOptions("int4", 16))
    graph = ir.load(bundle.file("prefill.onnxruntime-cpu.onnx")).graph
    branches = [node for node in graph if node.op_type == "If" and "then_branch" in node.attributes and "layers." in str(node.name)]
    assert branches
    for node in branches:
        inside = [each.op_type for each in ir.traversal.RecursiveGraphIterator(node.attributes["else_branch"].as_graph())]
        assert [each.op_type for each in node.attributes["then_branch"].as_graph()] == ["LinearAttention"]
        assert "DequantizeLinear" not in inside
    graphs = bundle.manifest.variants["onnxruntime-cpu"].graphs
    assert graphs["prefill"].chunks_in_place
    assert {each.steps_in_place for each in graphs.values()} == {True}
    assert not bundle.manifest.graphs["prefill"].steps_in_place
    backend, batch = OnnxRuntimeBackend(bundle), 64
    tracemalloc.start()
    runner = backend.open_runner(batch)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.5 * 4 * WIDE.state_elements * batch
    assert runner.read_state(batch - 1)["state.000"].shape == (1, 3, 64, 256)


@pytest.fixture
def loaded(monkeypatch):
    """Names of the files that ONNX Runtime loads."""
    names, load = [], onnxruntime.InferenceSession

    def session(path, *arguments, **options):
        names.append(Path(path).name)
        return load(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"variant": "onnxruntime-cpu"}, ["prefill.onnxruntime-cpu.onnx"]),
        ({"variant": "portable", "low_memory": True}, ["prefill.onnx"]),
        # As older versions do: the portable graphs take longer for a step through prefill.onnx.
        ({"variant": "portable"}, ["decode.onnx", "prefill.onnx"]),
    ],
)
def test_one_session_holds_quantized_weights_where_a_step_costs_no_more_in_it(tmp_path, loaded, options, expected):
    bundle = quantize_bundle(tiny.bundle(tmp_path, WIDE), tmp_path / "q.retnet", QuantizeOptions("int8"))
    runner = OnnxRuntimeBackend(bundle, **options).open_runner(1)
    runner.prefill(np.array([[1, 2, 3]]), np.array([3]))
    runner.step(np.array([4]))
    assert sorted(loaded) == expected
