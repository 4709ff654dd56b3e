"""The state of a layer is (H, Dk, Dv) everywhere, in whatever order a graph keeps it; with Dk = Dv its shape does not show that."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import oracle
import pytest
import tiny
from random_weights import random_weights

from retnet_export.graph.states import layout_of
from retnet_export.runtime.backends.base import initial_state, state_from_graph, state_to_graph
from retnet_export.runtime.backends.onnxruntime_api import is_older
from retnet_export.runtime.bundle.layout import AXES, StateLayout
from retnet_export.runtime.bundle.manifest import state_name, state_specs
from retnet_export.runtime.numerics import TOLERANCES, measure

# Dk = Dv, of a size that every variant has an operator for, and of two blocks a head.
SQUARE = tiny.config(hidden_size=64, num_heads=2, num_kv_heads=2, head_key_dim=128, head_value_dim=128)
WEIGHTS = random_weights(SQUARE, seed=2)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
TURNED = StateLayout(("batch", "head", "value", "key"))
NEEDS_OPERATORS = pytest.mark.skipif(
    is_older(onnxruntime.__version__, (1, 32)), reason="ONNX Runtime before 1.32 lacks operators of the variants"
)


VARIANTS = ("portable", "onnxruntime-cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One model with every variant of its graphs."""
    return tiny.bundle(tmp_path_factory.mktemp("square"), SQUARE, WEIGHTS, chunk=4)


def expected_state():
    state = oracle.initial_state(SQUARE)
    for position, token in enumerate(TOKENS):
        _, state = oracle.step(SQUARE, WEIGHTS, token, position, state)
    return state


@NEEDS_OPERATORS
@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_gives_the_oracles_state_by_heads_keys_and_values(bundle, name):
    session = tiny.model(bundle, name).session()
    session.feed(TOKENS[:5])
    for token in TOKENS[5:]:
        session.step([token])
    state = session.snapshot().state
    for layer, expected in enumerate(expected_state()):
        found = state[state_name(layer)][0]
        assert measure(found, expected).relative < TOLERANCES["chunkwise-float32"].relative
        assert measure(found.swapaxes(1, 2), expected).relative > 0.5  # the other way round it would be seen


@NEEDS_OPERATORS
@pytest.mark.parametrize("source", VARIANTS)
@pytest.mark.parametrize("target", VARIANTS)
def test_a_state_moves_between_all_forms(bundle, source, target):
    before, after = (tiny.model(bundle, name) for name in (source, target))
    session = before.session()
    session.feed(TOKENS)
    runner = after.backend.open_runner(2)
    runner.write_state(1, session.snapshot().state)
    runner.step(np.array([0, 7]))
    assert measure(runner.logits()[1], session.step([7])[0]).relative < TOLERANCES["chunkwise-float32"].relative


@NEEDS_OPERATORS
def test_a_state_is_read_back_bit_by_bit(bundle):
    runner, turned = (tiny.model(bundle, name).backend.open_runner(1) for name in VARIANTS)
    state = {name: np.random.default_rng(1).standard_normal(array.shape) for name, array in runner.read_state(0).items()}
    for each in (runner, turned):
        each.write_state(0, state | {"position": np.array([7])})
    for name, array in runner.read_state(0).items():
        np.testing.assert_array_equal(turned.read_state(0)[name], array)


def test_graphs_and_manifest_declare_the_same_layout(bundle):
    expected = {"portable": StateLayout(), "onnxruntime-cpu": StateLayout(pieces=2)}
    assert {spec.axes for spec in bundle.manifest.state if spec.layer is not None} == {AXES}
    for name, variant in bundle.manifest.variants.items():
        for spec in variant.graphs.values():
            assert spec.state_layout == layout_of(ir.load(bundle.file(spec.file))) == expected[name]


@pytest.mark.parametrize("layout", [StateLayout(), StateLayout(pieces=4), TURNED])
def test_a_state_comes_back_from_a_graphs_layout_as_it_went(layout):
    specs = state_specs(SQUARE, "float32")
    state = {name: np.random.default_rng(0).standard_normal(array.shape) for name, array in initial_state(specs).items()}
    state["position"] = np.array([12])
    kept = state_to_graph(specs, layout, state)
    assert kept[state_name(0)].shape == layout.shape((1, 2, 128, 128))
    assert all(array.flags.c_contiguous for array in kept.values())
    written = np.empty_like(kept[state_name(0)])
    layout.write(state[state_name(0)].astype(np.float32), written)
    np.testing.assert_array_equal(written, kept[state_name(0)])
    for name, array in state_from_graph(specs, layout, kept).items():
        np.testing.assert_array_equal(array, state[name].astype(array.dtype))


def test_states_of_24_layers_pair_in_the_order_of_their_names(tmp_path):
    """Triton Inference Server sorts state inputs and state outputs, and takes the first for the first."""
    bundle = tiny.bundle(tmp_path, tiny.config(num_layers=24))
    for name in ("decode.onnx", "prefill.onnx"):
        graph = onnx.load(bundle.file(name), load_external_data=False).graph
        inputs = sorted(value.name for value in graph.input if value.name not in ("tokens", "length", "rows"))
        outputs = sorted(value.name for value in graph.output if value.name != "logits")
        assert [f"{name}_out" for name in inputs] == outputs
        assert len(inputs) == 25
        assert [name for name in inputs if name != "position"] == [state_name(layer) for layer in range(24)]
    assert [spec.layer for spec in bundle.manifest.state] == [None, *range(24)]
