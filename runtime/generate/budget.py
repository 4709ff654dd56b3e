"""What drafts may cost: they are paid from what drafts have brought, and from a hundredth of the steps.

Rule: a pass that looks at drafts is charged with the time that it took beyond a step, both as measured here, and what was accepted
is credited with a step a token. So whatever the guesses are and whatever a backend says of its costs (`PassCost`), a text takes at
most `SHARE` longer than without drafts, and `FIRST` steps. Where drafts pay, the balance never binds, and a seed gives the same
passes every time.
"""

from __future__ import annotations

FIRST = 1.5
"""Steps that the first drafts of a session may cost."""
SHARE = 0.01
"""Of each step without drafts, for drafts to come."""
MOST_SAVED = 16.0
"""Steps that can be saved up."""
UP, DOWN = 1 / 8, 1 / 4
"""Weight of the newest step in the time of one, if it took longer and if it took less: a busy machine only makes a step longer."""
WORST = 4.0
"""A pass that takes longer than so many times what was expected was disturbed, unless the pass before it did, too."""


class Budget:
    """The balance of one session's drafts."""

    def __init__(self) -> None:
        self._credit = FIRST
        self._step_seconds: dict[int, float] = {}  # by how many sequences step
        self._last_ratio = 1.0

    def credit(self, sequences: int) -> float:
        """Steps of so many sequences that may be spent; none before one of them has been measured."""
        return self._credit if sequences in self._step_seconds else 0.0

    def note_step(self, sequences: int, seconds: float) -> None:
        """A step of so many sequences took so long."""
        known = self._step_seconds.get(sequences, seconds)
        seconds = min(seconds, WORST * known)
        self._step_seconds[sequences] = known + (UP if seconds > known else DOWN) * (seconds - known)
        self._add(SHARE)

    def note_pass(self, sequences: int, seconds: float, expected: float) -> None:
        """A pass over drafts, or over tokens accepted before, took so long; a step and `expected` steps more were expected."""
        step = self._step_seconds.get(sequences)
        ratio = (seconds / step - 1) / expected if step else 1.0
        self.spend(expected * min(ratio, max(WORST, self._last_ratio)))
        self._last_ratio = ratio

    def spend(self, steps: float) -> None:
        """A pass over drafts took so many steps beyond one, as far as is known."""
        self._add(-steps)

    def note_accepted(self, sequences: int) -> None:
        """A guess came true in one of so many sequences."""
        self._add(1 / sequences)

    def _add(self, steps: float) -> None:
        self._credit = min(self._credit + steps, MOST_SAVED)
