"""The generation loop: what was chosen is read, drafts are checked with it, the next tokens are chosen, until the text ends.

Rule: whoever generates (a session, many prompts, a server) does it here, and differs only in what happens between two passes. A
continuation chooses and gives text; the sequences read; a draft is a guess at what will be chosen, which changes the time and not
the text (speculation.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from retnet_export.runtime.backends.base import Checking, PassCost
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.budget import Budget
from retnet_export.runtime.generate.generation import Continuation, Piece
from retnet_export.runtime.generate.sampling import Logits
from retnet_export.runtime.generate.sequences import Sequences
from retnet_export.runtime.generate.slot import Slot
from retnet_export.runtime.generate.speculation import MOST, Draft, plan_drafts
from retnet_export.runtime.generate.stats import Stats

FREE = PassCost(0.0, 0.0)
"""Of drafts that were asked for: they are made whatever they cost."""


@dataclass(eq=False)
class Running:
    """A continuation and its sequence.

    Attributes:
        slot: the sequence.
        continuation: what chooses.
        most: tokens drafted at most; 0 for none.
        asked: whether so many are to be drafted whenever there is a guess, whatever that costs.
        position: where the sequence stands after the tokens chosen here; if it stands elsewhere, something else has used it.
        draft: the draft of the last pass, and the logits that it has shown.
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


@dataclass
class _Pass:
    """A pass over the first sequences.

    Attributes:
        drafts: what it looks at, of each sequence.
        on_trial: how many of these tokens the state takes in.
        expected: steps that it should take beyond one; None if the budget does not count it, or has counted it.
        seconds: how long it took.
    """

    drafts: Sequence[list[int]]
    on_trial: int = 0
    expected: float | None = None
    seconds: float = 0.0


class Loop:
    """Generates in the sequences of a session.

    Args:
        sequences: the session's.
        budget: of its drafts.
        stats: receives the times.
    """

    def __init__(self, sequences: Sequences, budget: Budget, stats: Stats | None = None) -> None:
        self._sequences, self._budget = sequences, budget
        self._stats = Stats(keep_steps=False) if stats is None else stats
        backend = sequences.backend
        self._pays = isinstance(backend, Checking)
        self._cost = backend.pass_cost if isinstance(backend, Checking) else FREE
        self._last = _Pass([])
        self._sampling_ms = self._choosing_ms = 0.0  # of the tokens that wait for the next pass: in sampling, and all together

    def begin(self, continuation: Continuation, place: int) -> Running:
        """Let a continuation go on from where a sequence stands."""
        slot, asked = self._sequences.slots[place], continuation.options.speculate
        most = (MOST if self._pays else 0) if asked is None else asked
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
        self._note_time(sampled - began)
        piece = continuation.accept(token)
        running.made.append(token)
        self._stats.new_tokens += 1
        row = None if continuation.stopped_in_text else running.draft.row_after(token)
        if row is not None:
            self._take(running, token, row)
        sampling_ms, total_ms = 1e3 * (sampled - began), 1e3 * (time.perf_counter() - began)
        if row is not None:
            self._stats.accepted += 1
            self._budget.note_accepted(len(self._last.drafts))
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
        planned = self._plan(running)
        shown = self._sequences.take_in(planned.drafts, planned.on_trial)
        for each, draft, rows in zip(running, planned.drafts, shown, strict=True):
            each.draft = Draft(draft, rows)
            self._stats.drafted += len(draft)
        seconds = time.perf_counter() - began
        planned.seconds, self._last = seconds, planned
        self._stats.add_step(1e3 * seconds, self._sampling_ms, 1e3 * seconds + self._choosing_ms)
        self._sampling_ms = self._choosing_ms = 0.0

    def interrupted(self) -> None:
        """Something else ran after the last pass, so its time on a GPU is not known: the budget pays what was expected."""
        if self._last.expected:
            self._budget.spend(self._last.expected)
        self._last.expected = None

    def _take(self, running: Running, token: int, logits: Logits | None) -> None:
        running.slot.choose(token, logits)
        running.position += 1

    def _plan(self, running: Sequence[Running]) -> _Pass:
        """What to look at in the next pass: guesses where they pay, or where they were asked for."""
        if not any(each.most for each in running):
            return _Pass([[]] * len(running))
        waiting = self._sequences.waiting(len(running))
        if not any(each.most and each.slot.history.guesses for each in running):
            return self._pass([[]] * len(running), waiting, running)
        room = self._sequences.chunk - max(waiting) - 1  # a trial that fails leaves all of it waiting, with the token after it
        most = [max(min(each.most, room, each.continuation.left - 1), 0) for each in running]
        chances = [each.slot.history.chances(count) for each, count in zip(running, most, strict=True)]
        asked = any(each.asked and row for each, row in zip(running, chances, strict=True))
        cost, credit = (FREE, math.inf) if asked else (self._cost, self._budget.credit(len(running)))
        plan = plan_drafts(cost, chances, waiting, undoes=self._sequences.undoes, credit=credit)
        lengths = [
            (count if each.asked and row else min(plan.length, len(row)))
            for each, row, count in zip(running, chances, most, strict=True)
        ]
        drafts = [each.slot.history.expected(length) for each, length in zip(running, lengths, strict=True)]
        return self._pass(drafts, waiting, running, plan.on_trial)

    def _pass(self, drafts: Sequence[list[int]], waiting: Sequence[int], running: Sequence[Running], on_trial: int = 0) -> _Pass:
        if any(each.asked for each in running):
            return _Pass(drafts, on_trial)
        longest = max(map(len, drafts))
        tokens = (max(waiting) if self._cost.again else 1) + longest
        steps = max(waiting) + longest == 1
        return _Pass(drafts, on_trial, 0.0 if steps else self._cost.surplus(len(running), tokens))

    def _note_time(self, choosing: float) -> None:
        """Tell the budget how long the last pass took. A GPU has finished it when the first token after it is chosen."""
        last = self._last
        if last.expected is None:
            return
        if last.expected:
            self._budget.note_pass(len(last.drafts), last.seconds + choosing, last.expected)
        else:
            self._budget.note_step(len(last.drafts), last.seconds + choosing)
        last.expected = None
