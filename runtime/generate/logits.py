"""What follows the last token of each sequence: logits that the runner has, or that a pass over a draft has shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.bundle.manifest import StateSpec
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.sampling import Logits, Row, Tokens
from retnet_export.runtime.generate.slot import Slot
from retnet_export.runtime.generate.state import first_broken_layer


@dataclass(frozen=True)
class View:
    """The logits of one sequence, for a continuation to choose from; the largest is checked first."""

    last: LastLogits
    place: int

    def top(self, k: int) -> tuple[Tokens, Logits]:
        tokens, logits = self.last.top(self.place, k)
        self.last.check_finite(logits[0], self.place)
        return tokens, logits

    def all(self) -> Logits:
        logits = self.last.row(self.place)
        # NaN is passed on by max, and so are +inf and a row of nothing but -inf.
        self.last.check_finite(logits.max(), self.place)
        return logits


class LastLogits:
    """The logits of all sequences of a runner.

    Args:
        runner: what holds those that no slot has.
        slots: of the sequences, by their place; looked at, not copied.
        specs: of the state, for messages.
    """

    def __init__(self, runner: Runner, slots: Sequence[Slot], specs: Sequence[StateSpec]) -> None:
        self._runner, self._slots, self._specs = runner, slots, specs
        self._tops: dict[int, tuple[Tokens, Logits]] = {}  # what was asked of the runner since its last pass, for all sequences

    def view(self, place: int) -> View:
        """One sequence's, for a continuation; made anew, because one that is kept would keep the runner and its memory."""
        return View(self, place)

    def changed(self) -> None:
        """The runner's are others now."""
        self._tops.clear()

    def table(self) -> Logits:
        """Float32 (B, V), valid until the next pass."""
        if all(slot.logits is None for slot in self._slots):
            return self._runner.logits()
        return np.stack([self.row(place) for place in range(len(self._slots))])

    def row(self, place: int) -> Logits:
        """All of one sequence's, (V,)."""
        own = self._slots[place].logits
        row: Logits = self._runner.logits()[place] if own is None else own
        return row

    def top(self, place: int, k: int) -> tuple[Tokens, Logits]:
        """The k largest of one sequence's; what the runner has to look up it looks up for all sequences at once."""
        own = self._slots[place].logits
        if own is not None:
            return Row(own).top(k)
        if k not in self._tops:
            self._tops[k] = self._runner.top(k)
        tokens, logits = self._tops[k]
        return tokens[place], logits[place]

    def check_finite(self, largest: np.floating[Any], place: int) -> None:
        """Refuse to choose from logits whose largest is not a number.

        Raises:
            UserError: it is not; the message names the step and the layer.
        """
        if math.isfinite(largest):
            return
        where = first_broken_layer(self._specs, self._runner.read_state(place))
        raise UserError(
            f"the logits after step {self._slots[place].position} are not finite ({largest}), so nothing was sampled: {where}. "
            "Reset the session or restore an earlier snapshot; if the bundle is fp16, export it with precision=fp32 or state=fp32"
        )
