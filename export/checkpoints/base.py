"""What every reader gives: a configuration, and weights by canonical name, read one at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from retnet_export.export.checkpoints.files import Found
from retnet_export.export.checkpoints.names import RenamedSource
from retnet_export.export.checkpoints.sources import Array, TensorSource, described
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import CheckpointWarning, UserError
from retnet_export.runtime.numerics import first_not_finite


def words(text: str) -> frozenset[str]:
    """Names separated by blanks, as a set."""
    return frozenset(text.split())


HUGGING_FACE_FIELDS = words("""
    _attn_implementation _commit_hash _name_or_path add_cross_attention architectures auto_map bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype eos_token_id finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id
    prefix problem_type pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_bfloat16 use_cache
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation attn_implementation
    gradient_checkpointing is_decoder_only
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
""")
"""Fields of any Hugging Face config.json that say nothing about the maths of a RetNet; the last lines are of generation."""
ROWS_ELEMENTS = 1 << 22
"""Elements of head and embedding that are compared at once."""


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
        weight: reads one canonical weight (graph/weights.py), in the checkpoint's own precision.
        files: the weight files.
        settings: of config.json or beside the tensors, as they are.
        text: the folder with the tokenizer and what goes with it; None if there is none to look in.
    """

    path: Path
    family: str
    config: ModelConfig
    weight: Callable[[str], Array]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: Path | None = None


def make_checkpoint(
    found: Found, family: str, config: ModelConfig, stored: Callable[[str], Stored], ignored: Collection[str] = ()
) -> Checkpoint:
    """Check that the files hold exactly what the configuration asks for, and give a reader of it.

    Args:
        config: the architecture; where it ties the head to the embedding and the files have another head, theirs is taken.
        stored: where a canonical weight is.
        ignored: tensors that need not be read (saved buffers).

    Raises:
        UserError: tensors are missing, not used, or of another shape; all are named.
    """
    if config.tied_embeddings:
        head, embedding = stored("head.weight").name, stored("embedding.weight").name
        ignored = {*ignored, head}
        if _is_other(found.source, head, embedding):
            config = replace(config, tied_embeddings=False)
            warnings.warn(
                f"{described(found.source)}: its settings tie the head to the embedding, but {head} is not {embedding}: "
                f"the model is exported with {head} as its head; if that is wrong, remove {head} from the file",
                CheckpointWarning,
                stacklevel=2,
            )
    check_weights(config, found.source, {name: stored(name) for name in weight_shapes(config)}, ignored)

    def weight(name: str) -> Array:
        place = stored(name)
        array = found.source.tensor(place.name, place.rows)
        if (first := first_not_finite(array)) is not None:
            index = [int(position) for position in np.unravel_index(first, array.shape)]
            raise UserError(
                f"{described(found.source)}: {place.name} holds {array.reshape(-1)[first]} at {index}: the model cannot compute "
                "anything; the training diverged, or the file is damaged: export an earlier checkpoint, or download it again"
            )
        return array

    return Checkpoint(
        path=found.path,
        family=family,
        config=config,
        weight=weight,
        files=found.source.files,
        settings=found.settings,
        text=found.path if found.path.is_dir() else found.path.parent,
    )


def with_embedding(found: Found, embedding: str, head: str, tied: bool) -> Found:
    """What was found, with the embedding under its own name.

    `safetensors.torch.save_model` keeps a matrix that has two names under one of them, which may be the head's.
    """
    names = set(found.source.names)
    if not tied or embedding in names or head not in names:
        return found
    return replace(found, source=RenamedSource(found.source, {embedding if name == head else name: name for name in names}))


def _is_other(source: TensorSource, head: str, embedding: str) -> bool:
    """Whether the files have a head that is not their embedding; read some rows at a time."""
    if not {head, embedding} <= set(source.names):
        return False
    shape = source.shape(head)
    if shape != source.shape(embedding) or not shape:
        return True
    step = max(1, ROWS_ELEMENTS // max(1, math.prod(shape[1:])))
    parts = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return not all(np.array_equal(source.tensor(head, part), source.tensor(embedding, part), equal_nan=True) for part in parts)


class Fields:
    """Typed look-ups in a checkpoint's settings, whose faults name the file and the field.

    Every look-up is remembered, so that `warn_of_others` can name the fields that nothing has looked at.
    """

    def __init__(self, found: Found) -> None:
        self._where, self._document = found.settings_from, found.settings
        self._seen: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        self._expect(type(value) is int, name, value, "a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        self._expect(type(value) in (int, float), name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        self._expect(type(value) is bool, name, value, "true or false")
        return bool(value)

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        value = self._get(name, default)
        self._expect(isinstance(value, str) and value in choices, name, value, " or ".join(map(repr, choices)))
        return choices[value]

    def refuse(self, name: str, allowed: object, why: str) -> None:
        """Refuse any value but `allowed`, or none at all: null, {}, [], or an object of such values.

        Raises:
            UserError: the field has another value; `why` says what it would mean and what to do.
        """
        self._seen.add(name)
        value = self._document.get(name)
        if value != allowed and not _says_nothing(value):
            raise UserError(f"{self._where}: {name} is {value!r}: {why}")

    def warn_of_others(self, harmless: Collection[str]) -> None:
        """Warn once about fields that were not read and are not `harmless`."""
        self.refuse("quantization_config", None, "its weights are quantized; export the checkpoint that they were made from")
        unseen = set(self._document) - self._seen - set(harmless)
        if others := sorted(name for name in unseen if not _says_nothing(self._document[name])):
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

    def _expect(self, holds: bool, name: str, value: object, expected: str) -> None:
        if not holds:
            raise UserError(f"{self._where}: {name} is {value!r}, expected {expected}")


def _says_nothing(value: object) -> bool:
    """Whether a field's value is none at all."""
    return value is None or value == [] or (isinstance(value, dict) and all(map(_says_nothing, value.values())))


def rows(source: TensorSource, name: str) -> int:
    """Rows of a tensor that every model of a family has."""
    if name not in source.names:
        raise UserError(f"{described(source)}: has no {name}; the checkpoint is incomplete")
    return source.shape(name)[0]


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
