"""An export leaves a whole bundle or nothing: not half of one after a kill, a full disk or an interrupt."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from random_weights import random_weights

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.bundle.files import sha256_of
from retnet_export.runtime.errors import UserError

SLOW_EXPORT = """
import sys, time
import tiny
from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import export_bundle
from random_weights import random_weights

config = tiny.config()
checkpoint = Checkpoint(path=".", family="random", config=config, weight=random_weights(config).__getitem__, files=())

def stop_half_way(stage, share):
    if share > 0.5:
        print("half of the weights are written", flush=True)
        time.sleep(60)

export_bundle(checkpoint, sys.argv[1], progress=stop_half_way)
"""
TESTS = Path(__file__).parents[1]


def random_checkpoint(folder: Path) -> Checkpoint:
    config = tiny.config()
    return Checkpoint(path=folder, family="random", config=config, weight=random_weights(config).__getitem__, files=())


@pytest.fixture
def half_way(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that has written about half of the weights of `tmp_path`/tiny.retnet, and waits."""
    paths = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, str(tmp_path / "tiny.retnet")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout.readline().startswith(b"half"), process.stderr.read().decode()
    yield process
    process.kill()
    process.communicate()


def test_a_kill_leaves_no_bundle_and_the_next_export_removes_the_rest(half_way, tmp_path):
    half_way.send_signal(signal.SIGKILL)
    half_way.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tiny.retnet.partial-")
    assert (left / "weights.bin").stat().st_size > 0
    with pytest.raises(UserError, match="no such bundle"):
        open_bundle(tmp_path / "tiny.retnet")
    export_bundle(random_checkpoint(tmp_path), tmp_path / "tiny.retnet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.retnet"]


def test_an_export_does_not_remove_what_another_is_still_writing(half_way, tmp_path):
    export_bundle(random_checkpoint(tmp_path), tmp_path / "tiny.retnet")
    assert len([entry for entry in tmp_path.iterdir() if ".partial-" in entry.name]) == 1


def test_an_interrupt_leaves_nothing(half_way, tmp_path):
    half_way.send_signal(signal.SIGINT)
    half_way.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    # A limit on the size of files stands in for the disk: the write fails in the middle in the same way.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"tiny\.retnet: cannot be written: File too large; nothing was kept"):
            export_bundle(random_checkpoint(tmp_path), tmp_path / "tiny.retnet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_hash_made_while_writing_is_the_files(tmp_path):
    bundle = export_bundle(random_checkpoint(tmp_path), tmp_path / "tiny.retnet")
    record = bundle.manifest.files["weights.bin"]
    assert record.bytes == bundle.file("weights.bin").stat().st_size
    assert record.sha256 == sha256_of(bundle.file("weights.bin"))


def test_the_checkpoints_hash_changes_with_any_weight_and_with_nothing_else(tmp_path):
    config = tiny.config()
    weights = random_weights(config)
    changed = {name: value.copy() for name, value in weights.items()}
    changed["layers.1.ffn.down.weight"][3, 5] += 1

    def sha256(name: str, weights: dict[str, np.ndarray], **options: object) -> object:
        (tmp_path / name).mkdir()
        return tiny.bundle(tmp_path / name, config, weights, **options).manifest.provenance["checkpoint_sha256"]

    first = sha256("first", weights)
    assert sha256("as fp16", weights, precision="fp16") == first
    assert sha256("changed", changed) != first
