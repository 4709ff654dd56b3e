"""Errors do not grow with the length of a sequence, wherever it starts: benchmarks/forever.py for a million tokens, in short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs the torch extra")

from drift import measure_drift, references  # noqa: E402
from random_weights import random_weights  # noqa: E402

from retnet_export.export.checkpoints import open_checkpoint  # noqa: E402 (needs torch)
from retnet_export.export.model import RetNet  # noqa: E402
from retnet_export.export.pipeline import export_bundle  # noqa: E402
from retnet_export.runtime.model import load  # noqa: E402
from retnet_export.runtime.numerics import TOLERANCES  # noqa: E402

CLASSICS = Path(__file__).parents[2] / "examples" / "classics"
LENGTH = 4_000
TOLERANCE = TOLERANCES["state-float32"].relative


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """The bundled model's first layer: its backend, its float64 form, and tokens of which half are one repeated."""
    checkpoint = open_checkpoint(CLASSICS)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, num_layers=1))
    bundle = export_bundle(checkpoint, tmp_path_factory.mktemp("bundle") / "layer.retnet")
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, LENGTH, dtype=np.int64)
    tokens[LENGTH // 4 : 3 * LENGTH // 4] = tokens[0]
    backend = load(bundle.path, "onnxruntime", threads=1, low_memory=False).backend
    return backend, RetNet.from_weights(checkpoint.config, checkpoint.weight, torch.float64), tokens


@pytest.mark.parametrize("chunk", [1, 128])
def test_the_state_error_stays_as_small_as_it_began(layer, chunk):
    backend, reference, tokens = layer
    expected = references(reference, tokens, 500)
    drifts = list(measure_drift(backend.open_runner(1), expected, reference.config, tokens, chunk=chunk))
    assert len(drifts) == LENGTH // 500
    assert max(drift.state for drift in drifts) < TOLERANCE
    assert max(drift.logits for drift in drifts) < TOLERANCES["onnxruntime-float32"].relative
    # Random tokens begin and end the sequence: what the last quarter shows, the first must have shown.
    assert max(drift.state for drift in drifts[-LENGTH // 2000 :]) < 3 * max(drift.state for drift in drifts[: LENGTH // 2000])


@pytest.mark.parametrize("start", [2**31 - 250, 2**32 - 250, 2**53 + 1, 2**62])
def test_a_sequence_may_start_at_any_position(layer, start):
    backend, reference, tokens = layer
    expected = references(reference, tokens[:500], 500)
    drifts = list(measure_drift(backend.open_runner(1), expected, reference.config, tokens[:500], start=start))
    assert max(drift.state for drift in drifts) < TOLERANCE
    assert max(drift.logits for drift in drifts) < TOLERANCES["onnxruntime-float32"].relative


def test_pairs_of_neighbouring_channels_are_turned_back_as_well(tmp_path):
    config = tiny.config(rotary_layout="interleaved")
    backend = load(tiny.bundle(tmp_path, config).path, "onnxruntime", threads=1).backend
    reference = RetNet.from_weights(config, random_weights(config).__getitem__, torch.float64)
    tokens = np.random.default_rng(0).integers(0, 50, 500, dtype=np.int64)
    (drift,) = measure_drift(backend.open_runner(1), references(reference, tokens, 500), config, tokens, chunk=128, start=2**40)
    assert drift.state < TOLERANCE
