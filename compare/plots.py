"""The figures, in the manner of the paper's Figure 6: memory, latency and throughput over context and batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retnet_export.compare import drawing
from retnet_export.compare.drawing import BLUE, GREEN, GREY, INK, PAGE, SOFT, VERMILION, Look
from retnet_export.compare.results import GENAI, LLAMA_CPP, RETNET, TRANSFORMER, Comparison, Measurement
from retnet_export.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = {
    RETNET: Look(BLUE, "-", "o", 2.4, order=4),
    TRANSFORMER: Look(VERMILION, "--", "s"),
    GENAI: Look(GREEN, "-.", "^", 1.4, order=2),
    LLAMA_CPP: Look(GREY, ":", "D", 1.4, order=2),
}
"""Of each engine."""

THEMED = {
    INK: "currentColor",
    SOFT: "var(--rule)",
    PAGE: "var(--page)",
    BLUE.lower(): "var(--retnet)",
    VERMILION.lower(): "var(--transformer)",
    GREEN.lower(): "var(--genai)",
    GREY: "var(--llama)",
}
"""Colors of an SVG figure that follow the page's theme, as variables of its style sheet (report.py)."""


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        name: of the PNG file.
        title: above it.
        caption: below it, what to see.
        draw: draws it into axes.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]


def plots(comparison: Comparison) -> list[Plot]:
    """Those figures for which there are numbers."""
    context = comparison.settings["batch_context"]
    found = []
    if len(comparison.cells("decode")) > 1:
        found = [
            Plot(
                "latency",
                "Time per token over context",
                "Median of single decode steps; bars reach to the 95th percentile. Lower is better.",
                lambda axes: _latency(axes, comparison),
            ),
            Plot(
                "memory",
                "Memory over context",
                "Resident memory of the process, one sequence: weights, and state or cache. Lower is better.",
                lambda axes: _memory(axes, comparison),
            ),
        ]
    if any(cell.batch > 1 for cell in comparison.cells("decode")):
        found += [
            Plot(
                "throughput",
                "Throughput over batch",
                f"Tokens per second of all sequences together, {context:,} tokens of context each. Higher is better.",
                lambda axes: _throughput(axes, comparison),
            ),
            Plot(
                "batch_memory",
                "Memory over batch",
                f"Resident memory of the process, {context:,} tokens of context for each sequence. Lower is better.",
                lambda axes: _batch_memory(axes, comparison),
            ),
        ]
    if comparison.cells("prefill"):
        found.append(
            Plot(
                "prefill",
                "Reading a prompt",
                "Tokens per second over the length of the prompt, one sequence. Higher is better.",
                lambda axes: _prefill(axes, comparison),
            )
        )
    return found


def svg(plot: Plot) -> str:
    """The figure as an SVG element in the colors of the page's theme."""
    text = drawing.svg(drawing.new_figure(plot.draw))
    for color, variable in THEMED.items():
        text = text.replace(color, variable)
    return text


def png(plot: Plot) -> bytes:
    """The figure as a PNG file."""
    return drawing.png(drawing.new_figure(plot.draw, title=plot.title))


def require_matplotlib() -> None:
    """Refuse before minutes of measuring if it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "compare", "drawing the report")


def _latency(axes: Axes, comparison: Comparison) -> None:
    for engine, found in _series(comparison, "decode", lambda m: m.cell.batch == 1 and m.timing is not None):
        medians = [m.timing.median_ms for m in found if m.timing]
        above = [max(0.0, m.timing.p95_ms - m.timing.median_ms) for m in found if m.timing]
        _line(axes, engine, [m.cell.context for m in found], medians, above)
    _finish(axes, "tokens of context", "ms per token", [cell.context for cell in comparison.cells("decode")])


def _memory(axes: Axes, comparison: Comparison) -> None:
    for engine, found in _series(comparison, "decode", lambda m: m.cell.batch == 1 and m.steady_bytes is not None):
        _line(axes, engine, [m.cell.context for m in found], [(m.steady_bytes or 0) / 1e6 for m in found])
    _finish(axes, "tokens of context", "MB", [cell.context for cell in comparison.cells("decode")])


def _throughput(axes: Axes, comparison: Comparison) -> None:
    context = comparison.settings["batch_context"]
    for engine, found in _series(comparison, "decode", lambda m: m.cell.context == context and m.timing is not None):
        _line(axes, engine, [m.cell.batch for m in found], [m.tokens_per_second or 0.0 for m in found])
    _finish(axes, "sequences in the batch", "tokens/s", _batches(comparison))


def _batch_memory(axes: Axes, comparison: Comparison) -> None:
    context = comparison.settings["batch_context"]
    for engine, found in _series(comparison, "decode", lambda m: m.cell.context == context and m.steady_bytes is not None):
        _line(axes, engine, [m.cell.batch for m in found], [(m.steady_bytes or 0) / 1e6 for m in found])
    _finish(axes, "sequences in the batch", "MB", _batches(comparison))


def _prefill(axes: Axes, comparison: Comparison) -> None:
    for engine, found in _series(comparison, "prefill", lambda m: m.timing is not None):
        _line(axes, engine, [m.cell.tokens for m in found], [m.tokens_per_second or 0.0 for m in found])
    _finish(axes, "tokens of the prompt", "tokens/s", [cell.tokens for cell in comparison.cells("prefill")])


def _batches(comparison: Comparison) -> list[int]:
    context = comparison.settings["batch_context"]
    return [cell.batch for cell in comparison.cells("decode") if cell.context == context]


def _series(comparison: Comparison, kind: str, wanted: Callable[[Measurement], bool]) -> list[tuple[str, list[Measurement]]]:
    found = []
    for engine in comparison.engines:
        points = [m for m in comparison.measurements if m.engine == engine and m.cell.kind == kind and wanted(m)]
        if points:
            found.append((engine, sorted(points, key=lambda m: (m.cell.context, m.cell.batch, m.cell.tokens))))
    return found


def _line(axes: Axes, engine: str, x: Sequence[float], y: Sequence[float], above: Sequence[float] | None = None) -> None:
    look = LOOKS[engine]
    look.draw(axes, x, y, engine)
    if above is not None:
        axes.errorbar(x, y, yerr=[[0.0] * len(y), above], fmt="none", ecolor=look.color, elinewidth=1.0, capsize=3)


def _finish(axes: Axes, x_label: str, y_label: str, ticks: Sequence[int]) -> None:
    drawing.logarithmic_x(axes, x_label, ticks)
    drawing.linear_y(axes, y_label)
