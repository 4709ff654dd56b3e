"""What lies at a path: the tensors, the settings beside or inside them; before anyone asks which family."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_export.export.checkpoints.folders import ARGS, CONFIG, EXPECTED, check_readable, weight_files
from retnet_export.export.checkpoints.sources import SafetensorsSource, TensorSource, TorchSource, load_torch, read_json
from retnet_export.runtime.errors import UserError

NESTED = ("model", "state_dict", "model_state_dict")
"""Keys under which a file of torch.save keeps its tensors when it keeps other things too."""
TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
OTHER_TOKENIZERS = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "dict.txt", "bpecodes"),
)
"""Files of tokenizers that become a tokenizer.json at export (export/tokenizers.py)."""
TEXT_FILES = (TOKENIZER, CHAT_TEMPLATE, TOKENIZER_CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, *OTHER_TOKENIZERS)
"""What is read of a checkpoint beside its tensors and settings, if it is there: how it takes and gives text (export/text.py)."""


@dataclass(frozen=True)
class Found:
    """An unread checkpoint.

    Attributes:
        path: as given, or the snapshot inside a hub cache.
        source: its tensors.
        settings: its settings, if any were found; empty otherwise.
        settings_from: where they were found, for messages.
    """

    path: Path
    source: TensorSource
    settings: Mapping[str, Any]
    settings_from: str


def find(path: Path) -> Found:
    """Find tensors and settings.

    Raises:
        UserError: nothing usable is there, or it is not clear which file is meant.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file or folder; expected {EXPECTED}")
    if not path.exists():
        check_readable(path)
    path = _snapshot(path)
    folder = path if path.is_dir() else path.parent
    settings_file = next((folder / name for name in (CONFIG, ARGS) if os.path.lexists(folder / name)), None)
    settings: Mapping[str, Any] = {} if settings_file is None else read_json(check_readable(settings_file))
    settings_from = str(folder / ARGS if settings_file is None else settings_file)
    model_type = settings.get("model_type", "retnet")
    if model_type != "retnet":
        raise UserError(f"{settings_file}: model_type is {model_type!r}, expected 'retnet'; only RetNets can be exported")
    files = weight_files(path)
    source: TensorSource
    if files[0].suffix == ".safetensors":
        source = SafetensorsSource(files)
    else:
        tensors, inside = {}, None
        for file in files:
            part, inside = _tensors_and_settings(file, load_torch(file))
            tensors.update(part)
        source = TorchSource(files, tensors)
        if inside is not None:
            settings, settings_from = inside, f"{files[0]} (settings)"
    for name in TEXT_FILES:
        if os.path.lexists(folder / name):
            check_readable(folder / name)
    return Found(path, source, settings, settings_from)


def _snapshot(path: Path) -> Path:
    """The checkpoint inside a repository of a hub cache (`models--owner--name`); any other path as it is."""
    revision = path / "refs" / "main"
    if not (path / "snapshots").is_dir():
        return path
    if revision.is_file():
        return path / "snapshots" / revision.read_text().strip()
    held = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    if len(held) != 1:
        raise UserError(f"{path}: holds {len(held)} snapshots and no refs/main; give the folder of one snapshot")
    return held[0]


def _tensors_and_settings(file: Path, document: Any) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Tensors and settings of a loaded file: a state_dict alone, or nested beside `args`, `cfg` or `config`."""
    import torch

    if not isinstance(document, dict):
        raise UserError(f"{file}: holds a {type(document).__name__}, expected a dictionary of tensors")
    nested = next((document[key] for key in NESTED if isinstance(document.get(key), dict)), document)
    tensors = {name: value for name, value in nested.items() if isinstance(value, torch.Tensor)}
    if others := [name for name in nested if name not in tensors]:
        raise UserError(f"{file}: {', '.join(map(str, others[:4]))} is not a tensor; expected a state_dict")
    return tensors, None if nested is document else next(_settings(document), None)


def _settings(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    cfg = document.get("cfg")
    for candidate in (document.get("args"), cfg.get("model") if isinstance(cfg, dict) else None, document.get("config")):
        found = candidate if isinstance(candidate, dict) else getattr(candidate, "__dict__", None)
        if found:
            yield {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}
