"""A model run a layer at a time computes what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
from random_weights import random_weights
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.layerwise import logits_by_layer
from retnet_export.export.model import RetNet, parallel_by_layer
from retnet_export.export.pipeline import export_bundle
from retnet_export.export.verify import verify, verify_by_layer
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.random.default_rng(2).integers(0, 50, 37, dtype=np.int64)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_both_graphs_compute_the_oracles_logits(name, tmp_path):
    config = tiny.CONFIGS[name]
    bundle = tiny.bundle(tmp_path, config, chunk=16)
    reference = oracle.logits(config, random_weights(config), TOKENS)
    tolerance = TOLERANCES["onnxruntime-float32"].relative
    assert measure(logits_by_layer(bundle, "decode", TOKENS, threads=1), reference).relative <= tolerance
    assert measure(logits_by_layer(bundle, "prefill", TOKENS, threads=1), reference[[15, 31, 36]]).relative <= tolerance


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_parallel_form_is_that_of_the_whole_model(name):
    config, tokens = tiny.CONFIGS[name], torch.from_numpy(TOKENS)[None]
    read = random_weights(config).__getitem__
    model = RetNet.from_weights(config, read)
    for result, clamp in zip(parallel_by_layer(config, read, tokens, clamps=(False, True)), (False, True), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result, model.parallel(tokens, clamp_rows=clamp))


def test_the_parallel_form_holds_one_layer_at_a_time():
    config = tiny.config(num_layers=6)
    weights = random_weights(config)
    read: list[str] = []

    def remember(name: str) -> np.ndarray:
        read.append(name)
        return weights[name]

    parallel_by_layer(config, remember, torch.from_numpy(TOKENS)[None])
    assert read == list(weight_shapes(config))  # each once, a layer after the other


def test_verify_by_layer_finds_what_verify_finds(tmp_path):
    config = tiny.CONFIGS["torchscale"]
    bundle = tiny.bundle(tmp_path, config, chunk=16)
    checkpoint = Checkpoint(path=tmp_path, family="random", config=config, weight=random_weights(config).__getitem__, files=())
    whole = verify(load(bundle.path, "onnxruntime", threads=1, low_memory=False), checkpoint, tokens=48)
    layered = verify_by_layer(bundle, checkpoint, tokens=48)
    assert layered.by_layer
    assert layered.passed == whole.passed is True
    assert layered.error.maximum < 2 * whole.error.maximum + 1e-6


def test_verify_by_layer_finds_a_wrong_weight(tmp_path):
    config = tiny.config()
    bundle = tiny.bundle(tmp_path, config, chunk=16)
    other = random_weights(config) | {"layers.1.ffn.down.weight": random_weights(config, seed=1)["layers.1.ffn.down.weight"]}
    checkpoint = Checkpoint(path=tmp_path, family="random", config=config, weight=other.__getitem__, files=())
    assert not verify_by_layer(bundle, checkpoint, tokens=48).passed


def test_the_command_runs_by_layer_when_asked_and_says_so(tmp_path):
    bundle = export_bundle(open_checkpoint(GOLDEN / "fla-tied"), tmp_path / "tied.retnet")
    command = ["verify", str(bundle.path), "--checkpoint", str(GOLDEN / "fla-tied"), "--tokens", "20", "--by-layer"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "the graphs were run a layer at a time on onnxruntime" in result.output
    assert open_bundle(bundle.path).manifest.verification["by_layer"] is True


def test_by_layer_on_another_backend_is_refused(tmp_path):
    command = ["verify", str(tmp_path), "--checkpoint", str(tmp_path), "--by-layer", "--backend", "tensorrt"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--by-layer runs on onnxruntime, not on --backend tensorrt" in result.output
