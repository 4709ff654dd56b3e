"""Many prompts through a batch of fixed size: each stops on its own, and its slot takes the next prompt at once.

Rule: a prompt's text does not depend on its neighbours. Slots share nothing but the step; a prompt is read by a session of
one, as it would be alone, and its state copied into the free slot; each has a sampler and a seed of its own. A slot without
work steps on with token 0, and what it makes is overwritten by the next prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Continuation, Finish, Options, Piece
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model


@dataclass(frozen=True)
class Prompt:
    """A prompt with options of its own.

    Attributes:
        text: what to continue, as text or token ids.
        options: how, instead of as the others.
    """

    text: str | Sequence[int]
    options: Options


@dataclass
class Completion:
    """What became of one prompt.

    Attributes:
        index: its place among the prompts.
        prompt: as given.
        seed: with which `Session.generate` gives the same text; None if none was given.
        text: what was generated; empty if the model has no tokenizer.
        pieces: the same, token by token.
        finish: why it ended.
    """

    index: int
    prompt: str | Sequence[int]
    seed: int | None
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def tokens(self) -> list[int]:
        """Ids of the generated tokens."""
        return [piece.token for piece in self.pieces if piece.token is not None]

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.pieces.append(piece)
        self.text += piece.text


def generate_many(
    model: Model,
    prompts: Iterable[str | Sequence[int] | Prompt],
    options: Options | None = None,
    *,
    batch: int = 8,
    after: Snapshot | None = None,
    stats: Stats | None = None,
    **changes: Any,
) -> Iterator[Completion]:
    """Continue many prompts.

    Args:
        model: the model.
        prompts: taken one by one as slots free, so there may be any number; a prompt may bring options of its own.
        options: how tokens are chosen and when to stop; `changes` are its fields by name. Prompt i has the seed `seed + i`.
        batch: prompts that generate together.
        after: what all prompts come after, read once: a system prompt, say.
        stats: receives where the time went; a token's time is that of a step for all slots.

    Yields:
        A completion for each prompt, in their order, each as soon as it and those before it are done.

    Raises:
        UserError: a prompt cannot be read; the message says which.
    """
    chosen = replace(options or Options(), **changes)
    if batch < 1:
        raise UserError(f"batch is {batch}, expected at least 1")
    return _in_order(_run(model, enumerate(prompts), chosen, batch, after, stats or Stats()))


def _in_order(completions: Iterator[Completion]) -> Iterator[Completion]:
    early: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        early[completion.index] = completion
        while following in early:
            yield early.pop(following)
            following += 1


def _run(
    model: Model,
    prompts: Iterator[tuple[int, str | Sequence[int] | Prompt]],
    options: Options,
    batch: int,
    after: Snapshot | None,
    stats: Stats,
) -> Iterator[Completion]:
    """Completions as they end."""
    first = list(islice(prompts, batch))
    if not first:
        return
    waiting = chain(first, prompts)
    reader, session = model.session(), model.session(len(first))
    after = after or reader.snapshot()
    jobs: list[_Job | None] = [None] * session.batch
    while True:
        tokens = np.zeros(session.batch, np.int64)
        sampling_ms, made = 0.0, 0
        for slot in range(session.batch):
            # A prompt may end with its first token: go on until this slot has a token to read, or no prompt is left.
            while (job := jobs[slot] or _start(reader, after, session, slot, waiting, options, stats)) is not None:
                began = time.perf_counter()
                token = job.next_token(session, slot)
                sampling_ms += 1e3 * (time.perf_counter() - began)
                jobs[slot] = None if job.ended else job
                made += token is not None
                if token is not None and not job.ended:
                    tokens[slot] = token
                    break
                yield job.completion
        if not any(jobs):
            stats.new_tokens += made
            return
        began = time.perf_counter()
        session.advance(tokens)
        graph_ms = 1e3 * (time.perf_counter() - began)
        stats.add_step(graph_ms, sampling_ms, graph_ms + sampling_ms, made)


@dataclass
class _Job:
    """A prompt in a slot."""

    completion: Completion
    continuation: Continuation

    @property
    def ended(self) -> bool:
        return self.continuation.finish is not None

    def next_token(self, session: Session, slot: int) -> int | None:
        """Choose a token and keep its text; None if it ended without one."""
        continuation, completion = self.continuation, self.completion
        try:
            token = None if self.ended else session.choose(continuation, slot)
        except UserError as error:
            raise UserError(f"prompt {completion.index}: {error}") from error
        if token is not None:
            completion.add(continuation.accept(token))
        if self.ended:
            if text := continuation.flush():
                completion.add(Piece(None, text))
            completion.finish = continuation.finish
        return token


def _start(
    reader: Session,
    after: Snapshot,
    session: Session,
    slot: int,
    waiting: Iterator[tuple[int, str | Sequence[int] | Prompt]],
    options: Options,
    stats: Stats,
) -> _Job | None:
    """Read the next prompt and put its state into a slot; None if there is none."""
    following = next(waiting, None)
    if following is None:
        return None
    index, prompt = following
    if isinstance(prompt, Prompt):
        text, own = prompt.text, prompt.options
    else:
        text, own = prompt, options if options.seed is None else replace(options, seed=options.seed + index)
    try:
        reader.restore(after)
        reader.feed(text, stats)
        session.restore(reader.snapshot(), slot)
        continuation = session.continuation(own, reader.model.bundle.manifest.tokenizer is not None, slot)
    except UserError as error:
        raise UserError(f"prompt {index}: {error}") from error
    return _Job(Completion(index, text, own.seed), continuation)
