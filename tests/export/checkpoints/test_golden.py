"""A checkpoint that the original package wrote comes out as a graph with the original package's logits.

The golden folders are made by tests/golden/make_*.py with the packages themselves; each meta.json names the versions, and
says what was reconstructed rather than run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.model import RetNet
from retnet_export.export.pipeline import export_bundle
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/expected.npz"))
# fairseq keeps its settings in one of two ways, and one case has both.
CHECKPOINTS = [file for folder in FOLDERS for file in (sorted(folder.glob("checkpoint_*.pt")) or [folder])]


def expected(checkpoint: Path) -> dict[str, np.ndarray]:
    """tokens (B, T) and logits (B, T, V) by form; `recurrent` is computed with exact angles and decays.

    Files in half precision have rounded the buffers `angle` and `decay`, and the packages compute with those. We compute
    with the exact ones, as the packages do for a checkpoint in float32, so their logits are taken with exact buffers too.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    with np.load(folder / "expected.npz") as arrays:
        found = dict(arrays)
    return found | {"recurrent": found.get("recurrent_exact_buffers", found["recurrent"])}


def name(path: Path) -> str:
    return str(path.relative_to(GOLDEN))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=name)
def test_the_exported_graph_has_the_original_packages_logits(checkpoint, tmp_path):
    golden = expected(checkpoint)
    export_bundle(open_checkpoint(checkpoint), tmp_path / "golden.retnet")
    session = load(tmp_path / "golden.retnet", "onnxruntime", threads=1).session(batch=len(golden["tokens"]))
    logits = np.stack([session.step(column).copy() for column in golden["tokens"].T], 1)  # (B, T, V)
    assert measure(logits, golden["recurrent"]).relative <= TOLERANCES["onnxruntime-float32"].relative
    assert (logits.argmax(-1) == golden["recurrent"].argmax(-1)).all()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=name)
def test_the_parallel_form_is_the_original_packages(checkpoint):
    golden = expected(checkpoint)
    if "recurrent_exact_buffers" in golden:
        pytest.skip("a file in half precision: its parallel form was computed with rounded angles and decays")
    opened = open_checkpoint(checkpoint)
    model = RetNet.from_weights(opened.config, opened.weight, torch.float64)
    with torch.no_grad():
        logits = model.parallel(torch.from_numpy(golden["tokens"])).numpy()
    assert measure(logits, golden["parallel"]).relative <= TOLERANCES["torch-float32"].relative


@pytest.mark.parametrize("case", ["torchscale-layernorm-embedding", "syncdoth-embedding"])
def test_rows_of_scores_are_divided_by_the_magnitude_of_their_sum(case):
    # At eps 1e-5 the row clamp is ten times the rounding error, so that the form without it would be caught.
    golden, opened = expected(GOLDEN / case), open_checkpoint(GOLDEN / case)
    model = RetNet.from_weights(opened.config, opened.weight, torch.float64)
    tokens = torch.from_numpy(golden["tokens"])
    with torch.no_grad():
        clamped, plain = (model.parallel(tokens, clamp_rows=clamp).numpy() for clamp in (True, False))
    assert 5 * measure(clamped, golden["parallel"]).relative < measure(plain, golden["parallel"]).relative


def test_every_golden_folder_says_which_package_made_it():
    for file in GOLDEN.glob("*/meta.json"):
        meta = json.loads(file.read_text())
        assert meta["package"]
        assert meta["package_version"]
