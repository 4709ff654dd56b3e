"""Text and tokens: encoding that refuses what it would lose, decoding as a stream of whole characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.manifest import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer


class Tokenizer:
    """A bundle's tokenizer.

    Args:
        path: tokenizer.json.
        spec: which ids begin and end a text.

    Raises:
        UserError: the file is not a tokenizer.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer as _Tokenizer

        try:
            self._tokenizer: _Tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer that the package 'tokenizers' reads: {error}") from error
        self.spec = spec

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text.

        Raises:
            UserError: it holds a character that the tokenizer cannot represent.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is not None and unknown in encoding.tokens:
            start, end = encoding.offsets[encoding.tokens.index(unknown)]
            raise UserError(
                f"the tokenizer does not know {text[start:end]!r} (character {start} of the text) and has no byte fallback; "
                "remove it"
            )
        return list(encoding.ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; bytes that form no character become U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder of tokens that come one at a time."""
        return TextStream(self._tokenizer)


class TextStream:
    """Turns tokens into text as they come, never half a character."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        self._pending.append(token)
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """What is left when no more tokens come: an unfinished character, as U+FFFD."""
        tokens, self._pending = self._pending, []
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, which may span tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError("a stop string is empty; leave --stop out to have none")
        self._stops, self._held = tuple(stops), ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is certainly before any stop string."""
        self._held += text
        cuts = [cut for cut in (self._held.find(stop) for stop in self._stops) if cut >= 0]
        if cuts:
            self.hit = True
            sure, self._held = self._held[: min(cuts)], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
