"""The prefill graph for CPUs reads one token as decode does, by one operator over the state, in place; all else in chunks."""

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
# Two pieces a head, and one.
WIDE = tiny.config(num_heads=3, num_kv_heads=1, head_key_dim=64, head_value_dim=256, hidden_size=192)
CONFIGS = {**tiny.CONFIGS, "two pieces a head": WIDE}
SAME = TOLERANCES["onnxruntime-float32"].relative


def runners(bundle, batch):
    """One session for everything, and a session a graph of the portable graphs."""
    shared = OnnxRuntimeBackend(bundle, variant="onnxruntime-cpu")
    assert shared._decode is shared._prefill
    return shared.open_runner(batch), OnnxRuntimeBackend(bundle, variant="portable", low_memory=False).open_runner(batch)


def agree(ours, theirs, slots):
    for slot in slots:
        for name, expected in theirs.read_state(slot).items():
            found = ours.read_state(slot)[name]
            assert measure(found, expected).relative < SAME if name != "position" else (found == expected).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_and_chunks_of_any_lengths_agree_with_the_portable_graphs(tmp_path, name):
    ours, theirs = runners(tiny.bundle(tmp_path, CONFIGS[name], chunk=6), 3)
    random = np.random.default_rng(0)
    lengths = [(1, 1, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1), (6, 1, 0), (2, 2, 2), (1, 1, 1)]
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


def test_weights_are_outside_the_branches_and_the_state_is_updated_in_place(tmp_path):
    bundle = quantize_bundle(tiny.bundle(tmp_path, WIDE), tmp_path / "q.retnet", QuantizeOptions("int4", 16))
    graph = ir.load(bundle.file("prefill.onnxruntime-cpu.onnx")).graph
    branches = [node for node in graph if node.op_type == "If"]
    assert len(branches) == WIDE.num_layers
    for node in branches:
        inside = [each.op_type for name in ("then_branch", "else_branch") for each in node.attributes[name].as_graph()]
        assert "LinearAttention" in inside
        assert not {"DequantizeLinear", "If"} & set(inside)
    assert {graph.steps_in_place for graph in bundle.manifest.variants["onnxruntime-cpu"].graphs.values()} == {True}
    assert not bundle.manifest.graphs["prefill"].steps_in_place
    runner = OnnxRuntimeBackend(bundle).open_runner(2)
    side = runner._side
    runner.step(np.array([1, 2]))
    assert runner._side == side


def test_older_versions_keep_a_session_a_graph_for_quantized_weights(tmp_path):
    bundle = quantize_bundle(tiny.bundle(tmp_path, WIDE), tmp_path / "q.retnet", QuantizeOptions("int8"))
    portable, shared = (
        OnnxRuntimeBackend(bundle, variant="portable"),
        OnnxRuntimeBackend(bundle, variant="portable", low_memory=True),
    )
    assert portable._decode is not portable._prefill
    assert shared._decode is shared._prefill
