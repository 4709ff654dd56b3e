"""A text from a file as the tokens of a bundle, for calibration and for evaluation; of the runtime's packages alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.tokenizer import UnknownCharacterError
from retnet_export.runtime.model import Model

CHUNK = 128
"""The fewest tokens that calibration and evaluation take; shorter texts say too little."""


def encode(model: Model, text: str, path: Path, part: slice = slice(None)) -> NDArray[np.int64]:
    """Token ids of a text from a file, or of a part of it, after those that begin a text, as `generate` reads it.

    Raises:
        UserError: it is empty or shorter than one chunk, or holds a character that the tokenizer does not know.
    """
    passage, start = text[part], part.indices(len(text))[0]
    if not passage.strip():
        what = "empty" if not text else "blank" if passage == text else f"blank from line {_line(text, start)} on"
        raise UserError(f"{path}: {what}; give a text of the kind that the model will continue")
    try:
        tokens = np.asarray(model.tokenizer.encode(passage, prefix=True), np.int64)
    except UnknownCharacterError as error:
        line = _line(text, start + error.position)
        raise UserError(
            f"{path}: line {line}: {model.bundle.path} has a tokenizer that does not know {error.character!r} and has no byte "
            "fallback; remove the character"
        ) from error
    if len(tokens) < CHUNK:
        raise UserError(f"{path}: {len(tokens)} tokens, shorter than one chunk of {CHUNK}; give a longer text")
    return tokens


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
