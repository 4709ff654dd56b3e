"""What all commands share: options, messages, tables, progress, and errors without tracebacks.

Rule: stdout carries the result (text, a table, or with --json one JSON document), stderr everything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from retnet_export.runtime.backends import Backends
from retnet_export.runtime.errors import (
    ArgumentError,
    BackendWarning,
    CheckpointWarning,
    PrecisionWarning,
    UserError,
    missing_extra,
)
from retnet_export.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from rich.table import Table


def bundle_path(given: str) -> Path:
    """The folder of a bundle that is named by a path or by a repository of the Hub, which is then downloaded."""
    from retnet_export.runtime.hub import bundle_folder

    return bundle_folder(given)


def checkpoint_path(given: str) -> Path:
    """The same for a checkpoint."""
    from retnet_export.export.checkpoints.hub import checkpoint_folder

    return checkpoint_folder(given)


BundlePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="A bundle: the folder that `export` wrote, or user/name on the Hub.", parser=bundle_path),
]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A trained RetNet: a Hugging Face folder, a .pt file, or user/name on the Hub.",
        parser=checkpoint_path,
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The bundle to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Json = Annotated[bool, typer.Option("--json", help="Print only one JSON document on stdout.")]
BackendName = Annotated[Backends, typer.Option("--backend", help="Which backend runs the model.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: the backend decides.")]
WIDE = 1000
"""Width of a table that is not for a terminal: enough to fold nothing."""
LowMemory = Annotated[
    bool | None,
    typer.Option(
        "--low-memory/--no-low-memory", help="Use less memory, or be faster; default: depends on the model and the free memory."
    ),
]


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
                warnings.showwarning = _show_warning
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
        one = name.removesuffix("ies") + "y" if name.endswith("ies") else name.removesuffix("s")
        found = [parameter for parameter in getattr(command, "params", ()) if parameter.name in (name, one)]
        return _spelling(found[0]) if found else None

    def _as_typed(self, message: str) -> str:
        """A message of the library with its arguments as command line options: `state=fp32` is `--state fp32`."""
        flags = {
            parameter.name: _spelling(parameter)
            for command in self.commands.values()
            for parameter in command.params
            if parameter.name is not None and parameter.opts[0].startswith("-")
        }
        named = re.compile(r"\b([a-z_]+)=(?=[\w'\"./-])|^([a-z_]+) (?=is |has |holds |goes |cannot )")

        def typed(found: re.Match[str]) -> str:
            flag = flags.get(found[1] or found[2])
            return found[0] if flag is None else f"{flag} "

        return named.sub(typed, message)


def _spelling(parameter: Any) -> str:
    """The spelling of a parameter on the command line: its longest flag, or an argument's name in capitals."""
    longest: str = max(parameter.opts, key=len)
    return longest if longest.startswith("-") else longest.upper()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises an exception, as SIGINT does, so that unfinished files are removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is read between tokens, so that it never interrupts a step; a second Ctrl-C does."""
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    if issubclass(category, (BackendWarning, CheckpointWarning, PrecisionWarning)):
        print_warning(str(message))
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def print_warning(message: str) -> None:
    typer.secho("warning: ", fg="yellow", bold=True, err=True, nl=False)
    typer.echo(message, err=True)


def print_error(message: str) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)


def print_json(document: object) -> None:
    typer.echo(json.dumps(finite(document), indent=2, ensure_ascii=False))


def finite(document: object) -> object:
    """A JSON document with null for NaN and infinity (the logarithm of a probability of 0): JSON has no such numbers."""
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [finite(value) for value in document]
    return document


def print_table(title: str, rows: Iterable[tuple[str, str]], *, err: bool = False) -> None:
    """Two columns, name and value; on stdout, or stderr with `err`."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    _print_whole(table, err=err)


def print_columns(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table of figures on stdout: names on the left, everything else on the right."""
    from rich.table import Table

    lines = [tuple(line) for line in lines]
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(head):
        # The first column has the names that users type: never fold them.
        whole = max(len(line[0]) for line in lines) if index == 0 and lines else None
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0, min_width=whole)
    for line in lines:
        table.add_row(*line)
    _print_whole(table)


def _print_whole(table: Table, *, err: bool = False) -> None:
    """Print a table as wide as the terminal; to a file or a pipe, as wide as it is."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    if stream.isatty():
        Console(highlight=False, markup=False, file=stream).print(table)
        return
    wide = Console(highlight=False, markup=False, file=stream, width=WIDE)
    with wide.capture() as printed:
        wide.print(table)
    typer.echo("\n".join(line.rstrip() for line in printed.get().rstrip("\n").split("\n")), err=err)


@contextlib.contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr, on a terminal only; yields a function that takes the stage and the share done."""
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        stage_now = ""

        def update(stage: str, share: float) -> None:
            nonlocal stage_now
            if stage != stage_now:
                stage_now = stage
                bar.reset(task, description=f"{title}: {stage}", total=1.0)
            bar.update(task, completed=share)

        yield update


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Integers separated by commas; none in an empty text."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ArgumentError(name, f"is {text!r}, expected integers separated by commas, for example {name}=0,2048") from error


def size(count: float) -> str:
    """Bytes as text: 11.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
