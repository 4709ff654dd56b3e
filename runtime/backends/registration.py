"""What the rest of the package knows about a backend. Each backend registers it once, in its own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from retnet_export.runtime.backends.base import Backend
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.numerics import Computation, Tolerance

WhyNot = Callable[[], str | None]
"""Says why something does not work here and what would make it work; None if it works. It never raises."""


@dataclass(frozen=True)
class Registration:
    """A backend, before any bundle is loaded.

    Attributes:
        name: as on the command line.
        open: loads a bundle; takes the bundle, `threads` and `low_memory`.
        unavailable: why no bundle can run here.
        purposes: rows of `doctor`: what the backend and what comes with it is for, and why that does not work here.
        state_passes: how often a sequence's state crosses the memory bus in a step, for `plan`.
        state_passes_of_batches: the same where several sequences step together, if that differs.
        state_sets: sets of state buffers that a batch has, for `plan` and `compare`: 2 if a run reads one and writes the other.
        basis: what the planner's constants for it rest on.
        tolerances: where logits may be further from the reference's than on the CPU, or for another reason.
        facts: what `doctor` says of the GPU's software, by name.
    """

    name: str
    open: Callable[[Bundle, int | None, bool | None], Backend]
    unavailable: WhyNot
    purposes: Mapping[str, WhyNot]
    state_passes: float
    basis: str
    tolerances: Mapping[Computation, Tolerance] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, str]] = dict
    state_passes_of_batches: float | None = None
    state_sets: int = 1

    def passes(self, batch: int) -> float:
        """How often the state of each of so many sequences crosses the memory bus in a step."""
        return self.state_passes if batch == 1 or self.state_passes_of_batches is None else self.state_passes_of_batches
