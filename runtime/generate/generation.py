"""One continuation, apart from the graph: from logits to tokens and text, until something ends it.

A session drives one of these, a batch drives several; both therefore end, stop and count alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import ArgumentError
from retnet_export.runtime.generate.sampling import Allowed, LogitsView, Row, Sampler, Sampling, log_softmax
from retnet_export.runtime.generate.text import StopStrings
from retnet_export.runtime.generate.tokenizer import Tokenizer

Finish = Literal["length", "stop", "end of text"]
"""Why a continuation ended: the token limit, a stop string or stop token, or a token that ends a text."""


@dataclass(frozen=True)
class Options(Sampling):
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: the most tokens to generate.
        stop: texts to end before; they may span tokens, and are not given.
        stop_tokens: token ids to end before, beside those that end a text in this model.
        logprobs: None for none; n for the log-probability of each chosen token and of the n most probable ones.
        min_new_tokens: no token that ends the text is chosen before so many.
        ignore_ends: tokens that end a text in this model are never chosen; `stop_tokens` still end it.
        speculate: the most tokens to guess and check in one pass (speculation.py), which changes the time and not the text; 0 for
            none, None for what pays on the backend.
    """

    max_new_tokens: int = 128
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    logprobs: int | None = None
    min_new_tokens: int = 0
    ignore_ends: bool = False
    speculate: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("max_new_tokens", self.max_new_tokens),
            ("min_new_tokens", self.min_new_tokens),
            ("logprobs", self.logprobs),
            ("speculate", self.speculate),
        ):
            if value is not None and value < 0:
                raise ArgumentError(name, f"is {value}, expected 0 or more")
        if "" in self.stops:
            raise ArgumentError("stop", "has an empty text; omit it")

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def changed(self, changes: OptionChanges) -> Options:
        """The same with some fields replaced.

        Raises:
            TypeError: there is no such field; the message names one that is spelt alike.
        """
        for name in changes.keys() - {field.name for field in fields(self)}:
            alike = get_close_matches(name, [field.name for field in fields(self)], 1)
            raise TypeError(f"there is no option {name!r}" + (f"; did you mean {alike[0]!r}?" if alike else ""))
        return replace(self, **changes)


class OptionChanges(TypedDict, total=False):
    """The fields of `Options` as keywords."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    max_new_tokens: int
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    logprobs: int | None
    min_new_tokens: int
    ignore_ends: bool
    speculate: int | None


@dataclass(frozen=True)
class Piece:
    """One generated token and the text it completed.

    Attributes:
        token: its id; None for text that was held back and is given at the end.
        text: whole characters, maybe none; up to a stop string.
        logprob: log-probability under the model itself (no bias, penalty, temperature or truncation), if asked for.
        top: the most probable tokens with theirs, if asked for.
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Continuation:
    """Chooses tokens for one sequence and turns them into text.

    Args:
        options: how, and until when.
        read: int32 (V,), how often the sequence has read each token; looked at, not copied.
        ends: tokens that end a text.
        tokenizer: for text; None gives tokens alone.
        context: tokens before the first one, which its text joins on to.

    Attributes:
        finish: why it ended; None while it has not.
        ended_by: the token that ended it, which was chosen and not read; None if something else did.
    """

    def __init__(
        self,
        options: Options,
        read: NDArray[np.int32],
        ends: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        context: Sequence[int] = (),
    ) -> None:
        if options.stops and tokenizer is None:
            raise ArgumentError("stop", "needs text: this generation gives token ids only; use stop_tokens")
        if beyond := [token for token in options.stop_tokens if not 0 <= token < len(read)]:
            raise ArgumentError("stop_tokens", f"has {beyond[0]}, which is not in the vocabulary of {len(read)}")
        self.options = options
        self.finish: Finish | None = "length" if options.max_new_tokens == 0 else None
        self.ended_by: int | None = None
        self._sampler, self._vocab_size = Sampler(options, read), len(read)
        self._ends, self._stop_tokens = frozenset(ends), frozenset(options.stop_tokens)
        self._decoder = None if tokenizer is None else tokenizer.decoder(context)
        self._stops = StopStrings(options.stops)
        self._made: list[int] = []
        self._texts: list[str] = []
        self._given = 0
        self._logprobs: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())

    def choose(self, view: LogitsView) -> int | None:
        """The next token; None if that ends the text."""
        if self.options.logprobs is not None:
            view = Row(view.all())
        barred = self._barred
        token = self._sampler.choose(Allowed(view, barred, self._vocab_size) if barred else view)
        if (count := self.options.logprobs) is not None:
            own = log_softmax(view.all())
            tokens, values = Row(own).top(count) if count else (np.zeros(0, np.int64), np.zeros(0, np.float32))
            self._logprobs = float(own[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        if token in self._ends:
            self.finish = "end of text"
        elif token in self._stop_tokens:
            self.finish = "stop"
        else:
            return token
        self.ended_by = token
        return None

    @property
    def _barred(self) -> frozenset[int]:
        """Tokens that may not be chosen yet."""
        if len(self._made) < self.options.min_new_tokens:
            return self._ends | self._stop_tokens
        return self._ends if self.options.ignore_ends else frozenset()

    def accept(self, token: int) -> Piece:
        """The text that the chosen token gives; sets `finish` if it was the last."""
        self._made.append(token)
        self._texts.append("" if self._decoder is None else self._decoder.push(token))
        text = self._stops.push(self._texts[-1])
        self._given += len(text)
        if self._stops.hit:
            self.finish = "stop"
        elif len(self._made) >= self.options.max_new_tokens:
            self.finish = "length"
        return Piece(token, text, *self._logprobs)

    def flush(self) -> str:
        """Text held back, once it has ended."""
        if self._decoder is None or self._stops.hit:
            return ""
        self._texts.append(self._decoder.flush())
        text = self._stops.end(self._texts[-1])
        self._given += len(text)
        self.finish = "stop" if self._stops.hit else self.finish
        return text

    @property
    def left(self) -> int:
        """How many tokens it may still take."""
        return self.options.max_new_tokens - len(self._made)

    @property
    def stopped_in_text(self) -> bool:
        """Whether a stop string ended it: its last tokens are then not all of the text."""
        return self._stops.hit

    @property
    def holds_text(self) -> bool:
        """Whether tokens were made whose text was not given yet: half a character, or what may begin a stop string."""
        return sum(map(len, self._texts)) > self._given or (self._decoder is not None and self._decoder.waits)

    def before_stop(self) -> tuple[list[int], str]:
        """What was given, without the stop string: whole tokens, and the beginning of the next one's text."""
        end = 0
        for count, text in enumerate(self._texts[: len(self._made)]):
            if end == self._given or end + len(text) > self._given:
                return self._made[:count], text[: self._given - end]
            end += len(text)
        return self._made, ""


class Generation:
    """The pieces of a continuation as they come; lazy.

    Attributes:
        finish: why it ended; None while it has not, or if it was abandoned.
        ended_by: the token that ended it, which was chosen and not read.
        holds_text: whether the session has read tokens whose text was not given yet.
    """

    def __init__(self, continuation: Continuation, pieces: Iterator[Piece]) -> None:
        self._continuation, self._pieces = continuation, pieces

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    @property
    def holds_text(self) -> bool:
        return self._continuation.holds_text

    def __repr__(self) -> str:
        return f"<Generation, {self.finish or 'not ended'}>"

    @property
    def finish(self) -> Finish | None:
        return self._continuation.finish

    @property
    def ended_by(self) -> int | None:
        return self._continuation.ended_by
