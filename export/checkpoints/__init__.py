"""Checkpoints: one reader per family behind `open_checkpoint`, which recognises the family by what it finds."""

from __future__ import annotations

from pathlib import Path

from retnet_export.export.checkpoints import fla
from retnet_export.export.checkpoints.base import Checkpoint, read_json
from retnet_export.runtime.errors import UserError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a trained RetNet, whichever public family it is of.

    Args:
        path: a Hugging Face folder with config.json and safetensors.

    Raises:
        UserError: nothing is there, it is damaged, or it is of no family that is known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a checkpoint folder with config.json and model.safetensors")
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint folder with config.json and model.safetensors")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(f"{path}: no config.json; expected a checkpoint folder with config.json and model.safetensors")
    config = read_json(config_path)
    model_type = config.get("model_type")
    if model_type != "retnet":
        raise UserError(f"{config_path}: model_type is {model_type!r}, expected 'retnet'; only RetNets can be exported")
    return fla.read(path, config)
