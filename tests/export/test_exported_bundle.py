"""What an export of the bundled model holds, and that a failed one leaves the old bundle alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
from conftest import EXAMPLE

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.runtime.bundle.bundle import open_bundle


def test_the_manifest_records_every_file_and_where_it_came_from(example_bundle):
    manifest = open_bundle(example_bundle.path).manifest
    assert set(manifest.files) == {path.name for path in example_bundle.path.iterdir()} - {
        "manifest.json",
        "README.md",
    }  # the card may be edited
    assert manifest.provenance["family"] == "fla"
    assert len(str(manifest.provenance["checkpoint_sha256"])) == 64
    assert manifest.model == open_checkpoint(EXAMPLE).config


def test_an_export_that_fails_midway_leaves_nothing(tmp_path):
    checkpoint = open_checkpoint(EXAMPLE)

    def read(name: str) -> np.ndarray:
        if name.startswith("layers.3."):
            raise OSError(28, "No space left on device")
        return checkpoint.weight(name)

    with pytest.raises(Exception, match="cannot be written: No space left on device; nothing was kept"):
        export_bundle(dataclasses.replace(checkpoint, weight=read), tmp_path / "out.retnet")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_bundle(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS["fla"])
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    checkpoint = open_checkpoint(EXAMPLE)

    def read(name: str) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(dataclasses.replace(checkpoint, weight=read), bundle.path, force=True)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.retnet"]


def test_each_weight_is_read_once(tmp_path):
    checkpoint = open_checkpoint(EXAMPLE)
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return checkpoint.weight(name)

    export_bundle(dataclasses.replace(checkpoint, weight=read), tmp_path / "out.retnet")
    assert len(asked) == len(set(asked))
