"""ONNX Runtime: however the weights are held, the same tokens give the same logits; and they are held once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime_api import FUSES_INTEGERS, is_older
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

TOKENS = np.random.default_rng(3).integers(0, 50, 40, dtype=np.int64)


@pytest.mark.parametrize("low_memory", [None, True])
def test_one_session_for_both_graphs_gives_what_two_give(tmp_path, low_memory):
    tiny.bundle(tmp_path, tiny.config(), chunk=16)
    path = tmp_path / "tiny.retnet"
    shared, separate = (load(path, threads=1, low_memory=choice).session() for choice in (low_memory, False))
    for session in (shared, separate):
        session.feed(TOKENS[:30].tolist())
        for token in TOKENS[30:]:
            session.step([token])
    assert measure(shared.logits, separate.logits).relative < TOLERANCES["chunkwise-float32"].relative


@pytest.mark.skipif(is_older(onnxruntime.__version__, FUSES_INTEGERS), reason="ONNX Runtime before 1.25 takes a session a graph")
def test_giving_memory_back_between_runs_changes_no_bit(tmp_path):
    bundle = quantize_bundle(tiny.bundle(tmp_path, tiny.config(hidden_size=64)), tmp_path / "q.retnet", QuantizeOptions("int4", 16))
    tidy, usual = (load(bundle.path, threads=1, low_memory=choice).session() for choice in (True, None))
    for session in (tidy, usual):
        session.feed(TOKENS[:30].tolist())
        session.step([1])
    np.testing.assert_array_equal(tidy.logits, usual.logits)


RESIDENT = """
import sys, numpy
from retnet_export.runtime.model import load

def resident(kind):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/smaps_rollup") if line.startswith(kind))

import onnxruntime
before = resident(sys.argv[3])
session = load(sys.argv[1], threads=1, low_memory={"None": None, "True": True, "False": False}[sys.argv[2]]).session()
session.feed(numpy.random.default_rng(0).integers(0, 50, 64).tolist())
session.step([1])
print(resident(sys.argv[3]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("low_memory", "kind", "least", "most"),
    [
        (None, "Rss:", 0.9, 1.4),  # one copy, packed
        (False, "Rss:", 1.8, 2.4),  # one a session
        (True, "Rss:", 0.9, 1.4),  # the mapped file,
        (True, "Anonymous:", 0.0, 0.4),  # which is no memory of the process itself
    ],
)
def test_weights_are_held_once_unless_speed_is_preferred(tmp_path, low_memory, kind, least, most):
    model = tiny.config(hidden_size=512, num_layers=6, head_key_dim=64, head_value_dim=128, ffn_size=2048)
    bundle = tiny.bundle(tmp_path, model, chunk=16)
    run = [sys.executable, "-c", RESIDENT, str(bundle.path), str(low_memory), kind]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert least < grown / (bundle.manifest.weights_bytes + bundle.manifest.state_bytes) < most
