"""What commands print: messages, tables, JSON, progress.

Rule: stdout carries the result (text, a table, or with --json one JSON document), stderr everything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from retnet_export.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 1000
"""Width of a table that is not for a terminal: enough to fold nothing."""


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


def size(count: float) -> str:
    """Bytes as text: 11.3 MB."""
    for unit, number in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= number:
            return f"{count / number:.1f} {unit}"
    return f"{count:.0f} B"
