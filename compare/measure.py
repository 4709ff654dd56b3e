"""The measurement: all engines take turns in one run, cell by cell, so that other load on the machine affects all alike.

For each cell every engine gets a fresh process; after a warm-up they take turns in rounds, A B A B. A cell that would not fit
in memory is reported and not attempted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_export.compare.results import Cell, Measurement, Timing
from retnet_export.compare.worker import MakeEngine, Worker
from retnet_export.runtime.device.memory import available_memory
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.progress import Progress, silent

ROUNDS = 5
WARM_UP = 2
"""Runs after the very first, which pages in the weights: they show how long a run takes."""
LONG_MS = 300.0
"""A run of this length needs no runs before it that do not count: waking up is no part of it that shows."""
SETTLE_SECONDS = 0.05
"""Between turns: threads of the engine that ran last stop spinning."""


@dataclass(frozen=True)
class Contender:
    """An engine that takes part.

    Attributes:
        name: in the report.
        make: makes it, in a separate process.
        needed_bytes: an estimate of the memory that a cell takes.
        refusal: why it cannot do a cell, or None.
    """

    name: str
    make: MakeEngine
    needed_bytes: Callable[[Cell], int]
    refusal: Callable[[Cell], str | None] = lambda cell: None


def measure(
    contenders: Sequence[Contender],
    cells: Sequence[Cell],
    *,
    seconds: float,
    budget: int,
    cores: Sequence[int],
    progress: Progress = silent,
) -> tuple[Measurement, ...]:
    """Run every contender in every cell.

    Args:
        contenders: who takes turns.
        cells: what is done.
        seconds: time for each contender in each cell, about.
        budget: bytes that a single contender may take; all together may take what the machine has free.
        cores: the cores to pin to.
    """
    found = []
    weights = np.array([_effort(cell) for cell in cells])
    for index, cell in enumerate(cells):
        progress("measuring", float(weights[:index].sum() / weights.sum()))
        found += _measure_cell(contenders, cell, seconds, budget, cores)
    progress("measuring", 1.0)
    return tuple(found)


def _effort(cell: Cell) -> float:
    """What a cell costs next to the others: a process for each engine, filled buffers, runs."""
    return 2.0 + cell.context * cell.batch / 16384 + (cell.tokens / 512 if cell.kind == "prefill" else 0.0)


def _measure_cell(
    contenders: Sequence[Contender], cell: Cell, seconds: float, budget: int, cores: Sequence[int]
) -> list[Measurement]:
    refused: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    times: dict[str, list[list[float]]] = {}
    runs = most_runs(cell)
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            refusal = contender.refusal(cell) or _does_not_fit(contender, cell, budget)
            if refusal is None:
                try:
                    workers[contender.name] = stack.enter_context(Worker(contender.make, cell, runs, cores))
                except UserError as error:
                    refusal = str(error)
            if refusal is not None:
                refused[contender.name] = refusal
        turns: dict[str, Turn] = {}
        for _ in range(1 + ROUNDS):
            for name, worker in list(workers.items()):
                time.sleep(SETTLE_SECONDS)
                try:
                    if name not in turns:
                        turns[name] = _warm_up(worker, cell, seconds, runs)
                        times[name] = []
                    else:
                        turn = turns[name]
                        times[name].append(worker.run(turn.wake_up + turn.runs)[turn.wake_up :])
                except UserError as error:
                    refused[name] = str(error)
                    del workers[name]
                    times.pop(name, None)
        memory: Mapping[str, tuple[int | None, int | None]] = {name: worker.memory() for name, worker in workers.items()}
    return [
        Measurement(name, cell, timing(times[name]), *memory[name])
        if name in times
        else Measurement(name, cell, note=refused[name])
        for name in (contender.name for contender in contenders)
    ]


@dataclass(frozen=True)
class Turn:
    """What an engine does when it is its turn.

    Attributes:
        wake_up: runs that do not count, while its threads and caches come back.
        runs: runs that count.
    """

    wake_up: int
    runs: int


def _warm_up(worker: Worker, cell: Cell, seconds: float, runs: int) -> Turn:
    """Run the cell for the first times, and see from that how often it can be run in a turn."""
    first = worker.run(1)[0]
    typical = first if first > LONG_MS else min(worker.run(WARM_UP))
    most = runs // ROUNDS - WARM_UP
    counted = int(np.clip(seconds * 1e3 / ROUNDS / typical, 1 if cell.kind == "prefill" else 5, most))
    return Turn(wake_up=0 if typical > LONG_MS else 1, runs=counted)


def most_runs(cell: Cell) -> int:
    """The most times a cell is run, which bounds how far a sequence grows while it is timed."""
    return ROUNDS * (50 + WARM_UP) if cell.kind == "decode" else ROUNDS * (4 + WARM_UP)


def timing(rounds: Sequence[Sequence[float]]) -> Timing:
    """Median, 95th percentile and the rounds' medians of times in milliseconds."""
    every = np.concatenate([np.asarray(times) for times in rounds])
    return Timing(
        runs=len(every),
        median_ms=float(np.median(every)),
        p95_ms=float(np.percentile(every, 95)),
        rounds_ms=tuple(float(np.median(times)) for times in rounds),
    )


def _does_not_fit(contender: Contender, cell: Cell, budget: int) -> str | None:
    needed, free = contender.needed_bytes(cell), available_memory()
    for limit, whose in ((budget, "the memory budget"), (free, "what is free on this machine")):
        if limit is not None and needed > limit:
            return f"needs about {needed / 1e9:.1f} GB, {whose} is {limit / 1e9:.1f} GB: not attempted"
    return None
