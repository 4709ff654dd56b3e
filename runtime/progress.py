"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Takes the stage and the share of it that is done, 0 to 1. What it raises ends the work there."""


def silent(stage: str, share: float) -> None:
    """Tell nobody."""
