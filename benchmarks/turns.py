"""Servers that take turns under the same load, and tables of the results.

Rule: in a round every candidate has its turn, and every other round goes backwards; a figure is the median over the rounds.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from clients import Figures, Server, load, median


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def in_ms(figures: tuple[float, ...]) -> str:
    return " / ".join(f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in figures)


def span(rounds: Sequence[Figures]) -> str:
    """Throughput: the median and what it lay between."""
    speeds = [each.speed for each in rounds]
    return f"{np.median(speeds):,.1f} [{min(speeds):,.1f}, {max(speeds):,.1f}]"


def take_turns(
    servers: Mapping[str, Server], counts: Sequence[int], rounds: int, seconds: float
) -> dict[tuple[str, int], list[Figures]]:
    """Load every server with every number of clients, in rounds, each watched for so many seconds."""
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    for number in range(rounds):
        for count in counts:
            for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
                found[name, count].append(asyncio.run(load(servers[name], count, seconds)))
    return found


def clients_table(found: Mapping[tuple[str, int], Sequence[Figures]], counts: Sequence[int]) -> None:
    """Print what clients saw."""
    rows = []
    for (name, count), rounds in sorted(found.items(), key=lambda each: (list(found).index((each[0][0], counts[0])), each[0][1])):
        middle, alone = median(rounds), median(found[name, counts[0]])
        rows.append([name, count, span(rounds), f"{middle.speed / alone.speed:.2f}", in_ms(middle.first), in_ms(middle.between)])
    times = "p50 / p95 / p99"
    table(
        ["server", "clients", "tokens/s", f"× {counts[0]} client", f"first token, ms, {times}", f"between tokens, ms, {times}"],
        rows,
    )
