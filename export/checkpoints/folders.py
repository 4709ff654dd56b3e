"""Which files of a folder are the weights; and what a folder is that has none of those that can be read.

Rule: a file is opened before anybody trusts that it is there, so that a dangling link, a pointer of Git LFS and a file that
nobody may read are named as what they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from retnet_export.export.checkpoints.sources import shards
from retnet_export.runtime.errors import UserError

CONFIG = "config.json"
ARGS = "args.json"
HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights in a Hugging Face folder; the first that is there is taken, as transformers does."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
EXPECTED = (
    f"a folder with {CONFIG} and model.safetensors or pytorch_model.bin, or a .pt file with its settings inside it or in "
    f"{ARGS} beside it"
)
NO_WEIGHTS = (
    "training_args.bin",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "random_states*",
    "*_states.pt",
    "adapter_model.*",
)
"""What training leaves beside the weights, or in their place, under a name that could be theirs."""
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
GIT_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Kind:
    """A folder of something else: a file that gives it away, what it is, and what makes a checkpoint of it."""

    pattern: str
    what: str
    remedy: str


KINDS = (
    Kind(
        "adapter_config.json",
        "a LoRA adapter, which has only differences from a model",
        "merge it first: model.merge_and_unload().save_pretrained(FOLDER), and export that folder",
    ),
    Kind("adapter_model.*", "a LoRA adapter", "merge it first: model.merge_and_unload().save_pretrained(FOLDER)"),
    Kind(
        "zero_to_fp32.py",
        "a checkpoint of DeepSpeed, whose weights are in pieces",
        "join them: python zero_to_fp32.py . pytorch_model.bin, and export the folder again",
    ),
    Kind("*_model_states.pt", "a checkpoint of DeepSpeed", "join its pieces with the zero_to_fp32.py of the folder above"),
    Kind(
        "*.distcp",
        "a checkpoint of torch.distributed, in pieces",
        "join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt",
    ),
    Kind("*.gguf", "a GGUF file, quantized for llama.cpp", "export the checkpoint that it was made from"),
    Kind("tf_model.h5", "weights of TensorFlow", "save them from PyTorch: save_pretrained(FOLDER)"),
    Kind("flax_model.msgpack", "weights of Flax", "save them from PyTorch: save_pretrained(FOLDER)"),
    Kind("manifest.json", "a bundle, which is already exported", "give it to `quantize`, `generate` or `compile`"),
)


def check_readable(file: Path) -> Path:
    """The file, which is there and holds what it should rather than a pointer to it.

    Raises:
        UserError: a link that leads nowhere, a pointer of Git LFS, or a file that cannot be read.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(GIT_LFS))
    except FileNotFoundError as error:
        if file.is_symlink():
            raise UserError(
                f"{file}: a link to {os.readlink(file)}, which does not exist; download or copy the checkpoint again"
            ) from error
        raise UserError(f"{file}: no such file") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if start == GIT_LFS:
        raise UserError(f"{file}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`, or download it again")
    return file


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files of weights at a path: a file, or a folder with one or with shards.

    Raises:
        UserError: there are none, they cannot be read, or it is not clear which are meant.
    """
    if path.is_file():
        if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
            raise UserError(f"{path}: expected a file ending in .safetensors, {', '.join(TORCH_SUFFIXES)}, or {EXPECTED}")
        return (check_readable(path),)
    for name in HUGGING_FACE_WEIGHTS:
        if os.path.lexists(path / name):
            check_readable(path / name)
            found = shards(path / name) if name.endswith(".index.json") else (path / name,)
            return tuple(map(check_readable, found))
    files = [entry for entry in sorted(path.iterdir()) if entry.suffix in (*TORCH_SUFFIXES, ".safetensors") and not entry.is_dir()]
    others = [file for file in files if not any(fnmatch(file.name, pattern) for pattern in NO_WEIGHTS)]
    if found := _shards_without_index(others):
        return tuple(map(check_readable, found))
    if len(others) == 1:
        return (check_readable(others[0]),)
    if others:
        raise UserError(f"{path}: holds {', '.join(file.name for file in others)}; give one of these files")
    _refuse_other_kinds(path)
    if inside := [entry for entry in _checkpoints(path) if any(entry.glob("*model*"))]:
        names = ", ".join(entry.name for entry in inside[-3:])
        raise UserError(
            f"{path}: the folder of a training run, whose weights are in {names}; give one of these folders, as {inside[-1]}"
        )
    beside = f" in it, only {', '.join(file.name for file in files[:3])}, which are not weights" if files else ""
    raise UserError(f"{path}: no weights{beside}; expected {EXPECTED}")


def _refuse_other_kinds(path: Path) -> None:
    names = [entry.name for entry in path.iterdir()]
    for kind in KINDS:
        if found := next((name for name in names if fnmatch(name, kind.pattern)), None):
            raise UserError(f"{path}: {found} says that this is {kind.what}; {kind.remedy}")


def _shards_without_index(files: Sequence[Path]) -> tuple[Path, ...]:
    """All shards of a model whose index is not there: their names say how many there are, and tensors say the rest."""
    named = {file: match for file in files if (match := SHARD.fullmatch(file.name))}
    models = {(match["stem"], match["count"], match["suffix"]) for match in named.values()}
    if len(models) != 1 or len(named) != len(files):
        return ()
    ((stem, count, suffix),) = models
    if missing := sorted(set(range(1, int(count) + 1)) - {int(match["number"]) for match in named.values()}):
        raise UserError(
            f"{files[0].parent}: {stem}-{missing[0]:05d}-of-{count}{suffix} is missing, {len(missing)} of {int(count)} shards "
            "are missing; copy the whole checkpoint"
        )
    return tuple(named)


def _checkpoints(path: Path) -> list[Path]:
    """The folders `checkpoint-500` of a Trainer, by their number."""
    found = [entry for entry in path.glob("checkpoint-*") if entry.is_dir() and entry.name[11:].isdecimal()]
    return sorted(found, key=lambda entry: int(entry.name[11:]))
