"""The one error for faults that a user can mend; anything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A fault in what the user gave: the message says what, where, what was expected and what to do.

    The command line prints it without a traceback and exits with 1.
    """


class MissingExtraError(UserError):
    """A package of an optional dependency group is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}', which is not installed: pip install 'retnet-export[{extra}]'")


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that was not read, and that the user should know of; the command line prints it once."""


class PrecisionWarning(UserWarning):
    """A format that was asked for and that this model is known to suffer from; the command line prints it once."""


def one_of(choices: Iterable[str]) -> str:
    """Choices as a message names them: "rtn, gptq or awq"."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
