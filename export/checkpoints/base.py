"""What every reader gives: a configuration, and weights by canonical name, read one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_export.export.checkpoints.files import Found
from retnet_export.export.checkpoints.sources import Array, TensorSource, described
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import CheckpointWarning, UserError


def words(text: str) -> frozenset[str]:
    """Names separated by blanks, as a set."""
    return frozenset(text.split())


HUGGING_FACE_FIELDS = words("""
    _attn_implementation _commit_hash _name_or_path add_cross_attention architectures auto_map bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id
    prefix problem_type pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_bfloat16 use_cache
""")
"""Fields of any Hugging Face config.json that say nothing about the maths of a RetNet."""


@dataclass(frozen=True)
class Stored:
    """Where a canonical weight is in the files: a tensor, or some of its rows."""

    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A trained RetNet on disk.

    Attributes:
        path: where it was opened.
        family: "fla", "torchscale" or "syncdoth".
        config: its architecture.
        read: reads one canonical weight (graph/weights.py), in the checkpoint's own precision.
        files: the weight files.
        tokenizer: tokenizer.json, if there is one.
        bos_id, eos_ids: tokens that begin and end a text.
    """

    path: Path
    family: str
    config: ModelConfig
    read: Callable[[str], Array]
    files: tuple[Path, ...]
    tokenizer: Path | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def make_checkpoint(
    found: Found, family: str, config: ModelConfig, stored: Callable[[str], Stored], ignored: Collection[str] = ()
) -> Checkpoint:
    """Check that the files hold exactly what the configuration asks for, and give a reader of it.

    Args:
        found: the files.
        family: its name.
        config: the architecture.
        stored: where a canonical weight is.
        ignored: tensors that need not be read (saved buffers).

    Raises:
        UserError: tensors are missing, not used, or of another shape; all are named.
    """
    check_weights(config, found.source, {name: stored(name) for name in weight_shapes(config)}, ignored)
    bos_id, eos_ids = token_ids(found.settings)

    def read(name: str) -> Array:
        place = stored(name)
        return found.source.read(place.name, place.rows)

    return Checkpoint(
        path=found.path,
        family=family,
        config=config,
        read=read,
        files=found.source.files,
        tokenizer=found.tokenizer,
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


class Fields:
    """Typed look-ups in a checkpoint's settings, whose faults name the file and the field.

    Every look-up is remembered, so that `warn_of_others` can name the fields that nothing has looked at.
    """

    def __init__(self, found: Found) -> None:
        self._where, self._document = found.settings_from, found.settings
        self._seen: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int:
            raise self._fault(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise self._fault(name, "a number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._fault(name, "true or false", value)
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._fault(name, " or ".join(map(repr, choices)), value)
        return choices[value]

    def refuse(self, name: str, allowed: object, why: str) -> None:
        """Refuse any value but `allowed` (or none at all).

        Raises:
            UserError: the field has another value; `why` says what it would mean and what to do.
        """
        self._seen.add(name)
        value = self._document.get(name)
        if value is not None and value != allowed:
            raise UserError(f"{self._where}: {name} is {value!r}: {why}")

    def warn_of_others(self, harmless: Collection[str]) -> None:
        """Warn, once, of fields that were neither looked up nor are `harmless`."""
        if others := sorted(set(self._document) - self._seen - set(harmless)):
            warnings.warn(
                f"{self._where}: {listed(others)} {'is' if len(others) == 1 else 'are'} unknown and not read; "
                "`retnet-export verify` cannot tell whether that changes the model",
                CheckpointWarning,
                stacklevel=2,
            )

    def _get(self, name: str, default: object) -> Any:
        self._seen.add(name)
        value = self._document.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self._where}: the field {name!r} is missing")
        return value

    def _fault(self, name: str, expected: str, value: object) -> UserError:
        return UserError(f"{self._where}: {name} is {value!r}, expected {expected}")


def rows(source: TensorSource, name: str) -> int:
    """Rows of a tensor that every model of a family has.

    Raises:
        UserError: the files do not have it.
    """
    if name not in source.names:
        raise UserError(f"{described(source)}: has no {name}; the checkpoint is incomplete")
    return source.shape(name)[0]


def token_ids(settings: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos of a config.json: eos may be one id or several."""
    bos, eos = settings.get("bos_token_id"), settings.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [eos]
    return bos if type(bos) is int else None, tuple(token for token in eos_ids if type(token) is int)


def check_weights(config: ModelConfig, source: TensorSource, stored: Mapping[str, Stored], ignored: Collection[str] = ()) -> None:
    """Compare what the configuration asks for with what the files hold, before anything is written.

    Raises:
        UserError: tensors are missing, unused, or of another shape; all are listed.
    """
    where = described(source)
    held = set(source.names)
    missing = sorted({place.name for place in stored.values()} - held)
    unused = sorted(held - {place.name for place in stored.values()} - set(ignored))
    problems = [f"missing: {listed(missing)}"] * bool(missing) + [f"not used: {listed(unused)}"] * bool(unused)
    if problems:
        raise UserError(f"{where}: its tensors are not those that its settings describe; {'; '.join(problems)}")
    wrong = []
    for name, expected in weight_shapes(config).items():
        place = stored[name]
        shape = source.shape(place.name)
        if place.rows is not None:
            shape = (len(range(*place.rows.indices(shape[0]))), *shape[1:])
        if shape != expected:
            wrong.append(f"{place.name} is {list(shape)}, expected {list(expected)}")
    if wrong:
        raise UserError(f"{where}: shapes do not match its settings: {listed(wrong)}")


def listed(items: Sequence[str], most: int = 8) -> str:
    """Names for a message."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
