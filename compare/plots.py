"""The figures, in the manner of the paper's Figure 6: memory, latency and throughput over context and batch.

Rule: readable in black and white. Engines differ by line style and marker as much as by colour, and the colours are Okabe and
Ito's, which the colour-blind tell apart.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retnet_export.compare.results import GENAI, LLAMA_CPP, RETNET, TRANSFORMER, Comparison, Measurement
from retnet_export.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, PAGE = "#1a1a1a", "#dddddd", "#ffffff"
"""Of text, of grid lines, and behind them."""

STYLES: dict[str, dict[str, Any]] = {
    RETNET: {"color": "#0072B2", "linestyle": "-", "marker": "o", "linewidth": 2.4, "zorder": 4},
    TRANSFORMER: {"color": "#D55E00", "linestyle": "--", "marker": "s", "linewidth": 2.0, "zorder": 3},
    GENAI: {"color": "#009E73", "linestyle": "-.", "marker": "^", "linewidth": 1.4, "zorder": 2},
    LLAMA_CPP: {"color": "#555555", "linestyle": ":", "marker": "D", "linewidth": 1.4, "zorder": 2},
}

THEMED = {
    INK: "currentColor",
    SOFT: "var(--rule)",
    PAGE: "var(--page)",
    "#0072b2": "var(--retnet)",
    "#d55e00": "var(--transformer)",
    "#009e73": "var(--genai)",
    "#555555": "var(--llama)",
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
    """The figure as an SVG element, its text as outlines, so that it needs no font."""
    buffer = io.StringIO()
    figure = _figure(plot)
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    for color, variable in THEMED.items():
        text = text.replace(color, variable)
    return text


def png(plot: Plot) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    _figure(plot, title=True).savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def require_matplotlib() -> None:
    """Find out that it is missing before minutes of measuring.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "compare", "drawing the report")


def _figure(plot: Plot, *, title: bool = False) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": PAGE,
        "axes.facecolor": PAGE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": SOFT,
        "axes.axisbelow": True,
        # The same input gives the same file.
        "svg.hashsalt": "retnet-export",
        "svg.fonttype": "path",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.0, 4.0), layout="constrained")
        axes = figure.subplots()
        plot.draw(axes)
        if title:
            figure.suptitle(plot.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        # Above the axes, where it hides no data.
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=2.6, columnspacing=1.4)
        return figure


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
    style = STYLES[engine]
    axes.plot(x, y, label=engine, markersize=6, markeredgecolor=PAGE, **style)
    if above is not None:
        axes.errorbar(x, y, yerr=[[0.0] * len(y), above], fmt="none", ecolor=style["color"], elinewidth=1.0, capsize=3)


def _finish(axes: Axes, x_label: str, y_label: str, ticks: Sequence[int]) -> None:
    """The y axis starts at 0. The x axis is logarithmic, or linear up to the first tick above 0 where it starts at 0."""
    ticks = sorted(set(ticks))
    least = min((tick for tick in ticks if tick > 0), default=1)
    if ticks[0] == 0:
        axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.7)
        x_label = f"{x_label} (linear up to {least:,}, then logarithmic)"
    else:
        axes.set_xscale("log", base=2)
        x_label = f"{x_label} (logarithmic)"
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(ticks) - (0.06 * least if min(ticks) == 0 else 0.07 * min(ticks)), max(ticks) * 1.25)
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.10g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
