"""The bundled checkpoint is a flash-linear-attention checkpoint: fla itself loaded it, and gave these logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "classics"


def test_the_graph_gives_the_logits_that_fla_gives(example_bundle):
    golden = np.load(GOLDEN / "fla.npz")
    assert json.loads((GOLDEN / "meta.json").read_text())["package"] == "flash-linear-attention"
    session = load(example_bundle.path, "onnxruntime").session()
    logits = np.stack([session.step([token])[0].copy() for token in golden["tokens"][0]])
    assert measure(logits[:, golden["columns"]], golden["logits"][0]).relative < TOLERANCES["onnxruntime-float32"].relative
    np.testing.assert_array_equal(logits.argmax(-1), golden["greedy"][0])
