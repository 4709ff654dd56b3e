"""Drafts by prompt lookup: guesses of the next tokens from what the sequence has read or written before.

Rule: a draft is only a guess at what will be chosen. It is checked by one pass over [tokens to take in, draft], which gives logits
after every one of them (`Runner.score`); each place then draws from its own logits, and the next place counts if the draw is what
the draft has there. So the text is the same as without, token by token. A draft that fails leaves no trace in the state: it did not
enter it, or the pass is undone (sequences.py).

How much to draft follows from how often such guesses were right. That is learned without drafting: after every token it is known
what the lookup would have said, by the length of the match. Nothing here looks at a clock; what drafts may cost in all is measured
(budget.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import PassCost

HISTORY = 4096
"""Tokens of a sequence that are remembered literally at least; twice as many at most."""
ORDERS = (5, 4, 3, 2)
"""Lengths of the runs that are looked up, the longest first."""
MOST = 15
"""Tokens drafted at most: then a pass has up to 31 tokens, 15 that were right, the one chosen after them, and 15 new guesses."""
BOUNDS = (3, 4, 5, 8, 16)
"""Matches are told apart by length: below 3, 4, 5, 8, 16, and longer."""
RESUMED = 3
"""Tokens right in a row after a wrong one, up to which a match that went on behind it is of a class of its own."""
MISSES = 3
"""Tokens wrong in a row after which a match is given up."""
PRIOR = (0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.3, 0.5, 0.6, 0.7, 0.2)
"""How often a match of each class predicts the next token, as assumed before anything is known: by length; then resumed ones; and
last, where the expected token was a surprise itself: a number that counts up in every line will be another one in the next, too."""
SURPRISE = len(PRIOR) - 1
RATE = 1 / 16
"""Weight of the newest guess in those shares."""
GAIN = 1.1
"""A pass must promise so many tokens in the time of one; less is not worth the risk."""
LEAST = 0.1
"""A draft ends where it is less probable than this."""


class History:
    """The last tokens of a sequence, and where it has been before.

    Args:
        tokens: read so far; the last `HISTORY` of them count.

    Attributes:
        watched: whether guesses are compared with what is chosen, so that `chances` follow it.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens = list(tokens[-HISTORY:])
        self._surprised = [False] * len(self._tokens)  # where another token was expected
        self._shares = list(PRIOR)
        self.watched = False
        self._forget()

    def _forget(self) -> None:
        # For runs of each length, the shortest first, the place of the token after them. A run of two has its last place; the place
        # that it had before goes to the run of three that ends there, and so on: every place is entered once.
        self._after: dict[int, dict[tuple[int, ...], int]] = {order: {} for order in reversed(ORDERS)}
        self._indexed = 0
        self._next: int | None = None  # the place of the token that is expected next
        self._matched = 0
        self._resumed, self._missed = False, 0

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Int32 (n,), n at most `HISTORY`."""
        return np.array(self._tokens[-HISTORY:], np.int32)

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens that were read."""
        self._tokens.extend(tokens)
        self._surprised.extend([False] * len(tokens))
        self._next, self._resumed, self._missed = None, False, 0
        if len(self._tokens) > 2 * HISTORY:
            del self._tokens[:-HISTORY], self._surprised[:-HISTORY]
            self._forget()

    def note(self, token: int) -> None:
        """Note a token that was chosen, and whether it was expected, if it is `watched`."""
        if not self.watched:
            self.extend([token])
            return
        expected, matched = self._next, self._matched
        if expected is None:
            self.extend([token])
            self._look_up()
            return
        right = self._tokens[expected] == token
        kind = self._kind(expected, matched)
        self._shares[kind] += RATE * (right - self._shares[kind])
        resumed, missed = self._resumed, 0 if right else self._missed + 1
        self.extend([token])
        self._surprised[-1] = not right
        if not self._indexed:  # the places have moved
            self._look_up()
            return
        self._index()
        if right and (resumed or matched >= ORDERS[0]):
            self._next, self._matched, self._resumed, self._missed = (
                expected + 1,
                matched + 1,
                resumed and matched < RESUMED,
                missed,
            )
        elif not right and (resumed or matched >= ORDERS[0]) and missed <= MISSES:
            # One token differs: a word that was edited, a number that counts. The match goes on behind it.
            self._look_up(ORDERS[0])
            if self._next is None:
                self._next, self._matched, self._resumed, self._missed = expected + 1, 0, True, missed
        else:
            self._look_up()

    @property
    def guesses(self) -> bool:
        """Whether there may be a guess at the next token."""
        return self._next is not None or not self._indexed

    def chances(self, most: int) -> list[float]:
        """How probable it is that the next token is the expected one, that the next two are, …; `most` at most."""
        if self._next is None and not self._indexed:
            self._look_up()
        chances: list[float] = []
        survives = 1.0
        while self._next is not None and len(chances) < most and survives > LEAST:
            survives *= self._shares[self._kind(self._source(len(chances)), self._matched + len(chances))]
            chances.append(survives)
        return chances

    def expected(self, count: int) -> list[int]:
        """The next tokens, if what happened before happens again; none if this place is new."""
        if self._next is None:
            return []
        return [self._tokens[self._source(number)] for number in range(count)]

    def _source(self, number: int) -> int:
        """The place of a guess by its number, from 0. A draft that reaches the end of the history repeats what it began with."""
        assert self._next is not None
        return self._next + number % (len(self._tokens) - self._next)

    def _index(self) -> None:
        """Enter the runs that end before the last token: those of two; an older place that one of them had gets a longer one."""
        tokens, last = self._tokens, len(self._tokens) - 1
        for place in range(max(self._indexed + 1, ORDERS[-1]), last + 1):
            entered: int | None = place
            for order, after in self._after.items():
                if entered is None or entered < order:
                    break
                run = tuple(tokens[entered - order : entered])
                older = after.get(run)
                after[run] = entered
                entered = older
        self._indexed = max(last, self._indexed)

    def _look_up(self, least: int = ORDERS[-1]) -> None:
        self._index()
        self._resumed, self._missed, self._next = False, 0, None
        found = (0, 0)  # the longest, and of several the newest
        for order, after in self._after.items():
            if (place := after.get(tuple(self._tokens[-order:]))) is None:
                break
            found = max(found, (self._length(place, order), place))
        if found[0] >= least:
            self._matched, self._next = found

    def _length(self, place: int, known: int) -> int:
        """How many tokens before a place are the last ones; so many are known to be."""
        tokens = self._tokens
        while known < min(ORDERS[0], place) and tokens[place - 1 - known] == tokens[-1 - known]:
            known += 1
        return known

    def _kind(self, place: int, matched: int) -> int:
        """The class of a match of that length, whose next token stands there."""
        if self._surprised[place]:
            return SURPRISE
        if self._resumed and matched <= RESUMED:
            return len(BOUNDS) + 1 + matched
        return next((kind for kind, bound in enumerate(BOUNDS) if matched < bound), len(BOUNDS))


@dataclass(frozen=True)
class Plan:
    """What a pass drafts: so many tokens of each sequence, of which the state takes in some on trial."""

    length: int
    on_trial: int


def plan_drafts(
    cost: PassCost, chances: Sequence[Sequence[float]], waiting: Sequence[int], *, undoes: bool, credit: float = math.inf
) -> Plan:
    """How many tokens to draft for sequences that step together; 0 if a step is the better choice.

    All rows of a pass are as wide as the widest, so one length serves all. What is accepted is read once more, into the state,
    unless it has entered the state on trial; if a trial fails, the tokens that waited are read again, too. So if c tokens wait, a
    will be accepted, and m guesses on trial all come true with probability P, then a + c - P · (c + m) are read again, on average:
    m is where that is least. A runner that keeps what a draft has shown reads nothing again.

    Args:
        cost: of a pass for one sequence.
        chances: of each sequence, as `History.chances` gives them.
        waiting: how many tokens of each sequence the state takes in for certain.
        undoes: whether the runner can take back a pass.
        credit: steps that the pass may take beyond one over the tokens that wait.
    """
    count, steps = len(chances), max(waiting) == 1
    waiting = waiting if cost.again else [1] * count  # drafts that came true wait as well, and cost nothing
    widest, certain = max(waiting), sum(waiting)
    base = 1 + (0.0 if steps else cost.surplus(count, widest))
    best, length, on_trial = GAIN, 0, 0
    accepted, longest = 0.0, 0.0
    trial, spared = 0, 0.0
    for number in range(1, 1 + max(map(len, chances), default=0)):
        column = [row[number - 1] for row in chances if len(row) >= number]
        accepted += sum(column)
        longest += max(column)
        if undoes:
            all_true = math.prod(row[min(number, len(row)) - 1] for row in chances if row)
            guessed = sum(min(number, len(row)) for row in chances)
            if all_true * (certain + guessed) - certain > spared:
                trial, spared = number, all_true * (certain + guessed) - certain
        if 1 + cost.surplus(count, widest + number) > base + credit:
            break
        again = max(longest - spared / count, 0.0) if cost.again else 0.0
        gain = (1 + accepted / count) * base / (1 + cost.surplus(count, widest + number + again))
        if gain > best:
            best, length, on_trial = gain, number, trial
    return Plan(length, on_trial)


@dataclass
class Draft:
    """A draft and what a pass has shown of it.

    Attributes:
        tokens: the draft.
        rows: logits after the tokens before it and after each one of it, (1 + len(tokens), V); None if nothing was drafted.
        used: how many of its tokens were chosen so far.
    """

    tokens: Sequence[int] = ()
    rows: NDArray[np.float32] | None = None
    used: int = 0

    def row_after(self, token: int) -> NDArray[np.float32] | None:
        """Logits (V,) after a token that was chosen, if it is the next one here; otherwise the draft has come to its end."""
        if self.rows is None or self.used == len(self.tokens) or self.tokens[self.used] != token:
            self.rows = None
            return None
        self.used += 1
        row: NDArray[np.float32] = self.rows[self.used]
        return row
