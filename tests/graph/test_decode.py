"""decode.onnx computes what the oracle computes, and is the graph that the design promises."""

from __future__ import annotations

import numpy as np
import onnx
import oracle
import pytest
import tiny
from random_weights import random_weights

from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

CONFIGS = {**tiny.CONFIGS, "odd head sizes": tiny.config(num_heads=2, num_kv_heads=2, head_key_dim=6, head_value_dim=432)}


def step_through(bundle, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of tokens (B, T), one step at a time."""
    runner = load(bundle.path, "onnxruntime", threads=1).backend.open_runner(len(tokens))
    rows = []
    for column in tokens.T:
        runner.step(column)
        rows.append(runner.logits().copy())
    return np.stack(rows, 1)


def reference(config, weights, tokens) -> np.ndarray:
    return np.stack([oracle.logits(config, weights, row) for row in tokens])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_steps_as_the_oracle_does(name, tmp_path):
    config = CONFIGS[name]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 64))
    actual = step_through(tiny.bundle(tmp_path, config), tokens)
    assert measure(actual, reference(config, random_weights(config), tokens)).relative < TOLERANCES["onnxruntime-float32"].relative


def test_half_precision_weights_keep_a_wide_state_and_residual(tmp_path):
    config = tiny.CONFIGS["fla"]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 64))
    actual = step_through(tiny.bundle(tmp_path, config, precision="fp16"), tokens)
    assert measure(actual, reference(config, random_weights(config), tokens)).relative < TOLERANCES["onnxruntime-float16"].relative


def test_a_half_precision_state_is_updated_in_float32(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS["fla"], state="fp16")
    graph = onnx.load(bundle.path / "decode.onnx").graph
    producers = {output: node for node in graph.node for output in node.output}
    assert producers["state.000_out"].op_type == "Cast"
    assert [producers[name].op_type for name in producers["state.000_out"].input] == ["Add"]


def test_the_graph_is_plain_onnx_at_opset_20_that_the_checker_accepts(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS["fla"])
    onnx.checker.check_model(str(bundle.path / "decode.onnx"), full_check=True)
    model = onnx.load(bundle.path / "decode.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert not {node.op_type for node in model.graph.node} & {"Loop", "Scan", "If"}


def test_every_state_input_has_an_output_of_its_name_and_nothing_else_is_there(tmp_path):
    graph = onnx.load(tiny.bundle(tmp_path, tiny.CONFIGS["fla"]).path / "decode.onnx").graph
    inputs, outputs = ([value.name for value in side] for side in (graph.input, graph.output))
    assert inputs == ["tokens", "position", "state.000", "state.001"]
    assert outputs == ["logits", *(f"{name}_out" for name in inputs[1:])]


def test_nodes_have_names_that_say_where_they_are(tmp_path):
    names = [node.name for node in onnx.load(tiny.bundle(tmp_path, tiny.CONFIGS["fla"]).path / "decode.onnx").graph.node]
    assert "layers.1.retention.projections" in names
    assert "layers.1.ffn.gate_up" in names
    assert len(set(names)) == len(names)


def test_weights_are_external_and_stored_once(tmp_path):
    config = tiny.config(tied_embeddings=True)
    bundle = tiny.bundle(tmp_path, config)
    stored = sum(weight.nbytes for weight in random_weights(config).values())
    model = onnx.load(bundle.path / "decode.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len({tensor.name for tensor in external}) == len(external)
    padding = 4096 * len(external)
    assert stored <= (bundle.path / "weights.bin").stat().st_size <= stored + padding


def test_a_fixed_batch_is_written_into_the_graph(tmp_path):
    graph = onnx.load(tiny.bundle(tmp_path, tiny.CONFIGS["fla"], batch=3).path / "decode.onnx").graph
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in graph.input] == [3] * len(graph.input)


def test_positions_beyond_int32_turn_by_the_same_angles(tmp_path):
    # Only differences of positions matter: a sequence that starts at 2^31 + 5 must give the logits of one that starts at 0.
    config = tiny.CONFIGS["fla"]
    bundle = tiny.bundle(tmp_path, config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 40)
    rows = {}
    for start in (0, 2**31 + 5, 2**53 + 1):
        runner = load(bundle.path, "onnxruntime", threads=1).backend.open_runner(1)
        runner.write_state(0, {**runner.read_state(0), "position": np.array([start])})
        rows[start] = []
        for token in tokens:
            runner.step(np.array([token]))
            rows[start].append(runner.logits()[0].copy())
    for start in (2**31 + 5, 2**53 + 1):
        assert measure(np.stack(rows[start]), np.stack(rows[0])).relative < TOLERANCES["onnxruntime-float32"].relative
