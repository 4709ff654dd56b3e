"""The generation loop: what was chosen is read, drafts are checked with it, the next tokens are chosen, until the text ends.

Rule: whoever generates (a session, many prompts, a server) does it here, and differs only in what happens between two passes. A
continuation chooses and gives text; the sequences read; a draft is a guess at what will be chosen, which changes the time and not
the text (speculation.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from retnet_export.runtime.backends.base import Checking, PassCost
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Continuation, Piece
from retnet_export.runtime.generate.sampling import Logits
from retnet_export.runtime.generate.sequences import Sequences
from retnet_export.runtime.generate.slot import Slot
from retnet_export.runtime.generate.speculation import MOST, Draft, length_of_drafts
from retnet_export.runtime.generate.stats import Stats


@dataclass(eq=False)
class Running:
    """A continuation and its sequence.

    Attributes:
        slot: the sequence.
        continuation: what chooses.
        most: tokens drafted at most; 0 for none.
        asked: whether so many are to be drafted whenever there is a guess, whatever that costs.
        position: of the sequence after what it was given here; it has been tampered with if it is elsewhere.
        draft: what the last pass has shown.
        made: the tokens chosen.
        waits: whether the last one of these has not been read.
    """

    slot: Slot
    continuation: Continuation
    most: int
    asked: bool
    position: int
    draft: Draft = field(default_factory=Draft)
    made: list[int] = field(default_factory=list)
    waits: bool = False

    @property
    def read(self) -> list[int]:
        """The tokens chosen that the sequence has read."""
        return self.made[:-1] if self.waits else self.made


class Loop:
    """Generates in the sequences of a session.

    Args:
        sequences: the session's.
        stats: receives the times.
    """

    def __init__(self, sequences: Sequences, stats: Stats | None = None) -> None:
        self._sequences, self._stats = sequences, Stats() if stats is None else stats
        backend = sequences.backend
        self._cost = backend.pass_cost if isinstance(backend, Checking) else None
        self._sampling_ms = self._choosing_ms = 0.0  # of the tokens that wait for the next pass: in sampling, and all together

    def begin(self, continuation: Continuation, place: int) -> Running:
        """Let a continuation go on from where a sequence stands."""
        slot, asked = self._sequences.slots[place], continuation.options.speculate
        most = (MOST if self._cost is not None else 0) if asked is None else asked
        slot.history.watched = most > 0
        return Running(slot, continuation, most, asked is not None, slot.position)

    def choose(self, running: Running, place: int) -> Piece | None:
        """The next piece; None if the text has ended. If the token now `waits`, it must `advance` before it chooses again.

        Raises:
            UserError: the logits are not finite, or the sequence is not where its last token was read.
        """
        continuation, slot = running.continuation, running.slot
        if continuation.finish is not None:
            return None
        if self._sequences.slots[place] is not slot or slot.position != running.position:
            raise UserError("the session was fed, restored or reset while it was generating; start a new generation")
        began = time.perf_counter()
        token = continuation.choose(self._sequences.view(place))
        if token is None:
            return None
        sampled = time.perf_counter()
        piece = continuation.accept(token)
        running.made.append(token)
        self._stats.new_tokens += 1
        row = None if continuation.stopped_in_text else running.draft.row_after(token)
        if row is not None:
            self._take(running, token, row)
        sampling_ms, total_ms = 1e3 * (sampled - began), 1e3 * (time.perf_counter() - began)
        if row is not None:
            self._stats.accepted += 1
            self._stats.add_to_step(sampling_ms, total_ms)
        else:
            running.waits = True
            self._sampling_ms += sampling_ms
            self._choosing_ms += total_ms
        return piece

    def advance(self, running: Sequence[Running]) -> None:
        """Read the tokens that wait, of the first so many sequences, and look at what follows drafts in the same pass."""
        began = time.perf_counter()
        for each in running:
            self._take(each, each.made[-1], None)
            each.waits = False
        drafts = self._drafts(running)
        for each, draft, rows in zip(running, drafts, self._sequences.take_in(drafts), strict=True):
            each.draft = Draft(draft, rows)
            self._stats.drafted += len(draft)
        graph_ms = 1e3 * (time.perf_counter() - began)
        self._stats.add_step(graph_ms, self._sampling_ms, graph_ms + self._choosing_ms)
        self._sampling_ms = self._choosing_ms = 0.0

    def _take(self, running: Running, token: int, logits: Logits | None) -> None:
        running.slot.choose(token, logits)
        running.position += 1

    def _drafts(self, running: Sequence[Running]) -> list[list[int]]:
        """What to look at in the next pass: guesses where they pay, or where they were asked for."""
        if not any(each.most for each in running):
            return [[] for _ in running]
        room = self._sequences.chunk - max(len(each.slot.ahead) for each in running)
        most = [min(each.most, room, each.continuation.left - 1) for each in running]
        chances = [each.slot.history.chances(count) for each, count in zip(running, most, strict=True)]
        paying = length_of_drafts(
            self._cost or PassCost(0.0, 0.0), [[] if r.asked else row for r, row in zip(running, chances, strict=True)]
        )
        lengths = [
            (count if row else 0) if each.asked else min(paying, len(row))
            for each, row, count in zip(running, chances, most, strict=True)
        ]
        return [each.slot.history.expected(length) for each, length in zip(running, lengths, strict=True)]
