"""The group of all commands: faults as messages and exit codes, and what a signal does.

Rule: a fault that the user can fix is one message on stderr, without a traceback; the exit code is 2 if a flag is at fault, else 1.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import typer

from retnet_export.commands.output import print_error, print_warning
from retnet_export.runtime.errors import (
    ArgumentError,
    BackendWarning,
    CheckpointWarning,
    PrecisionWarning,
    UserError,
    missing_extra,
)

ARGUMENT = re.compile(r"\b([a-z_]+)=(?:(True)\b|(?=[\w'\"./-]))|^([a-z_]+) (?=is |has |holds |goes |cannot )")
"""An argument in a message of the library: `state=fp32`, `force=True`, or as the subject of the sentence."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it cleans up what Ctrl-C cleans up."""


class Commands(typer.core.TyperGroup):
    """Turns a fault that the user can fix into one message on stderr and exit code 1, or 2 if a flag is at fault."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands with their whole help; click cuts it to one line."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in found if command is not None])

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings(), terminable():
                warnings.showwarning = self._show_warning
                return super().invoke(ctx)
        except Terminated as error:
            raise typer.Exit(128 + signal.SIGTERM) from error
        except ArgumentError as error:
            flag = self._flag(ctx, error.name)
            print_error(self._as_typed(str(error) if flag is None else f"{flag} {error.problem}"))
            raise typer.Exit(1 if flag is None else 2) from error
        except UserError as error:
            print_error(self._as_typed(str(error)))
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            if (missing := missing_extra(error, f"`{ctx.info_name} {ctx.invoked_subcommand}`")) is None:
                raise
            print_error(str(missing))
            raise typer.Exit(1) from error
        except BrokenPipeError as error:
            # The reader of our output has closed it, as in `generate … | head`: exit silently.
            with contextlib.suppress(OSError):
                sys.stdout = open("/dev/null", "w")  # noqa: SIM115 (lives until exit)
            raise typer.Exit(1) from error

    def _flag(self, ctx: Any, name: str) -> str | None:
        """The option for the parameter of that name in the command that ran; None if there is none."""
        command = self.commands.get(ctx.invoked_subcommand)
        known = {parameter.name: parameter for parameter in getattr(command, "params", ())}
        found = known.get(name, known.get(_one_of(name)))
        return None if found is None else _spelling(found)

    def _as_typed(self, message: str) -> str:
        """A message of the library with its arguments as command line options: `state=fp32` is `--state fp32`."""
        flags = {
            parameter.name: _spelling(parameter)
            for command in self.commands.values()
            for parameter in command.params
            if parameter.name is not None and parameter.opts[0].startswith("-")
        }

        def typed(found: re.Match[str]) -> str:
            name = found[1] or found[3]
            flag = flags.get(name) or flags.get(_one_of(name))
            return found[0] if flag is None else flag if found[2] else f"{flag} "

        return ARGUMENT.sub(typed, message)

    def _show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if issubclass(category, (BackendWarning, CheckpointWarning, PrecisionWarning)):
            print_warning(self._as_typed(str(message)))
        else:
            typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _one_of(name: str) -> str:
    """The singular of an argument that takes several: the option for it may be repeated."""
    return name.removesuffix("ies") + "y" if name.endswith("ies") else name.removesuffix("s")


def _spelling(parameter: Any) -> str:
    """The spelling of a parameter on the command line: its longest flag, or an argument's name in capitals."""
    longest: str = max(parameter.opts, key=len)
    return longest if longest.startswith("-") else longest.upper()


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal in the block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises an exception, as SIGINT does, so that unfinished files are removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled(signal.SIGTERM, end):
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is read between tokens, so that it never interrupts a step; a second Ctrl-C does."""
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    with _handled(signal.SIGINT, note):
        yield lambda: interrupted
