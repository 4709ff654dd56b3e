"""Many prompts through a batch of fixed size: each stops on its own, and its slot takes the next prompt at once.

Rule: a prompt's text does not depend on its neighbours, and completions come in the order of their prompts. The engine does
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import ArgumentError, UserError
from retnet_export.runtime.generate.engine import Engine
from retnet_export.runtime.generate.generation import Finish, OptionChanges, Options, Piece
from retnet_export.runtime.generate.jobs import Ended, Failed, Job, Made
from retnet_export.runtime.generate.reading import OpenSession
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Prompt:
    """A prompt with its own options.

    Args:
        text: what to continue, as text or token ids.
        changes: options by name, instead of those of the others: `Prompt("In the", temperature=0.0)`.

    Raises:
        TypeError: there is no such option.
    """

    def __init__(self, text: str | Sequence[int], **changes: Unpack[OptionChanges]) -> None:
        Options().changed(changes)
        self.text, self.changes = text, changes

    def __repr__(self) -> str:
        return f"Prompt({', '.join([repr(self.text), *(f'{name}={value!r}' for name, value in self.changes.items())])})"


@dataclass
class Completion:
    """The result of one prompt.

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
    open_session: OpenSession,
    prompts: Iterable[str | Sequence[int] | Prompt],
    options: Options | None = None,
    *,
    batch: int = 8,
    after: Snapshot | None = None,
    stats: Stats | None = None,
    **changes: Unpack[OptionChanges],
) -> Iterator[Completion]:
    """Continue many prompts.

    Args:
        open_session: of the model.
        prompts: taken one by one when slots become free, so there may be any number; a prompt may have its own options.
        options: how tokens are chosen and when to stop; `changes` are its fields by name. Prompt i has the seed `seed + i`, unless
            it brings one.
        batch: prompts that generate together.
        after: what all prompts continue, read once: a system prompt, say.
        stats: receives where the time went; a token's time is that of a step for all slots.

    Yields:
        A completion for each prompt, in their order, each as soon as it and those before it are done.

    Raises:
        UserError: a prompt cannot be read; the message says which.
    """
    chosen = (options or Options()).changed(changes)
    if isinstance(prompts, (str, bytes)):
        raise ArgumentError("prompts", "is a single text, expected several: generate_many([text])")
    if batch < 1:
        raise ArgumentError("batch", f"is {batch}, expected at least 1")
    return _in_order(_run(open_session, enumerate(prompts), chosen, batch, after, stats))


def _in_order(completions: Iterator[Completion]) -> Iterator[Completion]:
    early: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        early[completion.index] = completion
        while following in early:
            yield early.pop(following)
            following += 1


def _run(
    open_session: OpenSession,
    prompts: Iterator[tuple[int, str | Sequence[int] | Prompt]],
    options: Options,
    batch: int,
    after: Snapshot | None,
    stats: Stats | None,
) -> Iterator[Completion]:
    """Completions as they end."""
    first = list(islice(prompts, batch))
    if not first:
        return
    waiting = chain(first, prompts)
    engine, beginning = Engine(open_session, len(first), stats=stats), open_session(1)
    if after is not None:
        beginning.restore(after)
    running: dict[Job, Completion] = {}
    while True:
        while engine.free > 0 and (following := next(waiting, None)) is not None:
            index, prompt = following
            text = prompt.text if isinstance(prompt, Prompt) else prompt
            try:
                own = _own(options, index, prompt)
                if isinstance(text, (bytes, bytearray)):
                    raise ArgumentError("the prompt", "is bytes, expected a str or token ids; decode it first")
                tokens = beginning.encode(text) if isinstance(text, str) else text
                job = Job(tokens, [own], after, with_text=beginning.manifest.tokenizer is not None)
                engine.add(job)
            except UserError as error:
                raise UserError(f"prompt {index}: {error}") from error
            running[job] = Completion(index, text, own.seed)
        if not engine.busy:
            return
        for event in engine.turn():
            completion = running[event.job]
            if isinstance(event, Made):
                completion.add(event.piece)
            elif isinstance(event, Ended):
                completion.finish = event.finish
                yield running.pop(event.job)
            elif isinstance(event, Failed):
                if isinstance(event.error, UserError):
                    raise UserError(f"prompt {completion.index}: {event.error}") from event.error
                raise event.error


def _own(options: Options, index: int, prompt: str | Sequence[int] | Prompt) -> Options:
    """Options of one prompt: those of all, the seed counted up, and then its own options."""
    own = options if options.seed is None else replace(options, seed=options.seed + index)
    return own.changed(prompt.changes) if isinstance(prompt, Prompt) else own
