"""The measurement: all engines take turns in one run, cell by cell, so that whatever disturbs the machine disturbs all alike.

For each cell every engine gets a fresh process; after a warm-up they take turns in rounds, A B A B. A cell that would not fit
in memory is reported and not attempted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_export.compare.machine import available_memory
from retnet_export.compare.results import Cell, Measurement, Timing
from retnet_export.compare.worker import MakeEngine, Worker
from retnet_export.runtime.errors import UserError

ROUNDS = 5
WARM_UP = 3
"""Runs before the first round: they page in the weights and show how long a run takes."""
SETTLE_SECONDS = 0.05
"""Between turns: threads of the engine that ran last stop spinning."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Contender:
    """An engine that takes part.

    Attributes:
        name: in the report.
        make: makes it, in a process of its own.
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
    progress: Progress = lambda stage, share: None,
) -> tuple[Measurement, ...]:
    """Run every contender in every cell.

    Args:
        contenders: who takes turns.
        cells: what is done.
        seconds: time for each contender in each cell, about.
        budget: bytes that a single contender may take; all together may take what the machine has free.
        cores: the cores to pin to.
        progress: is told the share done.
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
        per_round = {}
        for name, worker in list(workers.items()):
            try:
                # The first run is a warm-up even of the clock: it is slower than what follows.
                slowest = max(worker.run(WARM_UP)[1:])
                per_round[name] = int(
                    np.clip(seconds * 1e3 / ROUNDS / slowest, 1 if cell.kind == "prefill" else 5, runs // ROUNDS - WARM_UP)
                )
                times[name] = []
            except UserError as error:
                refused[name] = str(error)
                del workers[name]
        for _ in range(ROUNDS):
            for name, worker in list(workers.items()):
                time.sleep(SETTLE_SECONDS)
                try:
                    # One run to wake up, which does not count.
                    times[name].append(worker.run(1 + per_round[name])[1:])
                except UserError as error:
                    refused[name] = str(error)
                    del workers[name], times[name]
        memory: Mapping[str, tuple[int | None, int | None]] = {name: worker.memory() for name, worker in workers.items()}
    return [
        Measurement(name, cell, timing(times[name]), *memory[name])
        if name in times
        else Measurement(name, cell, note=refused[name])
        for name in (contender.name for contender in contenders)
    ]


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
