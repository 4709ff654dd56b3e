"""Tokens into text as they come: whole characters, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import ArgumentError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_WAIT = 16
"""Tokens that may wait for a complete character before they count as broken; valid text needs at most four."""


class TextDecoder:
    """Turns tokens into text as they come, in complete characters.

    Rule: the pieces, joined, are what the tokenizer makes of all tokens at once. A decoder may look at a token's neighbours
    (spaces at the start of a text, bytes that form one character), so each token is decoded together with those before it that
    formed the last whole text, and what the longer text adds is the piece. A text that ends in U+FFFD may be the start of a
    character: it waits.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._settled: list[int] = []
        self._waiting: list[int] = []
        self._given = 0
        self._before = ""
        for token in context:
            self.push(token)
        if self._waiting:
            # The context ends in U+FFFD. Should that be all it was going to be, it is the context's, not ours to give.
            self._before = tokenizer.decode(self._settled + self._waiting)

    def push(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._settled + self._waiting)
        whole = len(text.rstrip(REPLACEMENT))
        if whole < len(text) and len(self._waiting) < LONGEST_WAIT:
            piece, self._given = text[self._past(text) : whole], max(self._given, whole)
            return piece
        piece = text[self._past(text) :]
        self._before = ""
        # What was whole up to here is context for the next token; tokens without text (special ones) give none.
        alone = len(self._tokenizer.decode(self._waiting))
        if alone or len(self._settled) >= LONGEST_WAIT:
            self._settled, self._given = self._waiting, alone
        else:
            self._settled, self._given = self._settled + self._waiting, len(text)
        self._waiting = []
        return piece

    @property
    def waits(self) -> bool:
        """Whether the last tokens may be the beginning of a character."""
        return bool(self._waiting)

    def flush(self) -> str:
        """The rest after the last token: an unfinished character, as U+FFFD."""
        text = self._tokenizer.decode(self._settled + self._waiting)
        piece, self._given = text[self._past(text) :], len(text)
        return piece

    def _past(self, text: str) -> int:
        """How much of a text was given before, or is the context's."""
        return max(self._given, len(self._before) if text.startswith(self._before) else 0)


class StopStrings:
    """Holds text back while it may begin a stop string, which may span tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ArgumentError("stop", "has an empty text; omit it")
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

    def end(self, text: str) -> str:
        """The last text, and what was held back, up to a stop string."""
        sure = self.push(text)
        held, self._held = self._held, ""
        return sure + held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
