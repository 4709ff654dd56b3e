"""Checkpoints and tokenizers by their name on the Hub: which files of a repository are needed, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from retnet_export.export.checkpoints.files import TEXT_FILES
from retnet_export.export.checkpoints.folders import ARGS, CONFIG, HUGGING_FACE_WEIGHTS, TORCH_SUFFIXES
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.hub import Repository, download, repository

SETTINGS = (CONFIG, ARGS)


def checkpoint_folder(given: str | Path) -> Path:
    """The path of a checkpoint; of a repository, its snapshot in the cache, with settings, tokenizer and one set of weights.

    Raises:
        UserError: the repository is not there, has no weights, or cannot be reached.
    """
    if (found := repository(given)) is None:
        return Path(given)
    folder = download(found, _beside_weights, "files are missing")
    return download(found, lambda names: [*_beside_weights(names), *_weights(found, names, folder)], "shards are missing")


def tokenizer_folder(given: str | Path) -> Path:
    """The folder with the files of a tokenizer: a folder, one of its files, or a repository, of which no weights are downloaded.

    Raises:
        UserError: nothing is there.
    """
    if (found := repository(given)) is not None:
        return download(found, lambda names: [name for name in names if name in TEXT_FILES], "files are missing")
    path = Path(given)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a folder with tokenizer.json, or user/name on the Hub")
    return path if path.is_dir() else path.parent


def _beside_weights(names: Iterable[str]) -> list[str]:
    """Settings, tokenizer, and the index of shards."""
    names = list(names)
    weights = next((name for name in HUGGING_FACE_WEIGHTS if name in names), "")
    index = [weights] if weights.endswith(".index.json") else []
    return [name for name in names if name in (*SETTINGS, *TEXT_FILES)] + index


def _weights(found: Repository, names: Iterable[str], folder: Path) -> list[str]:
    """The weights that `weight_files` would take of these names.

    Args:
        folder: where its index is, if it has one.

    Raises:
        UserError: there are none, or several.
    """
    names = list(names)
    if first := next((name for name in HUGGING_FACE_WEIGHTS if name in names), None):
        if not first.endswith(".index.json"):
            return [first]
        try:
            return sorted(set(json.loads((folder / first).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{found}: its {first} is not an index of shards: {error}") from error
    others = [name for name in names if "/" not in name and name.endswith((*TORCH_SUFFIXES, ".safetensors"))]
    if len(others) == 1:
        return others
    raise UserError(
        f"{found}: "
        + (f"holds {', '.join(others)}; download one of them" if others else "no weights; is it a checkpoint?")
        + f" (`hf download {found.name}`), and give its path"
    )
