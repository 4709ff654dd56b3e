"""Fixtures that several folders use: the bundled model, and its bundle, made once."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.runtime.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "classics"


@pytest.fixture(scope="session")
def example_bundle(tmp_path_factory) -> Bundle:
    """The bundled model, exported in float32. Tests that change it copy it first."""
    return export_bundle(open_checkpoint(EXAMPLE), tmp_path_factory.mktemp("example") / "classics.retnet")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; a value of `...` removes the field."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not ...}))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background with SIGINT ignored, and the commands that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
