"""How every figure of the project looks: one size, one palette, one way to label a logarithmic axis.

Rule: legible on a phone and in black and white. A figure is 6 inches wide and its text has 12 points, which is the size of small
print when a screen of 390 pixels shows it. Lines differ by style and marker as much as by color, and the colors are Okabe and
Ito's, which color-blind readers can tell apart. The title and the legend stand above the axes, where they hide no data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, SOFT, PAGE = "#1a1a1a", "#dddddd", "#ffffff"
"""Color of text, of grid lines, and of the page behind them."""
BLUE, VERMILION, GREEN, GREY, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#555555", "#E69F00", "#56B4E9"
WIDTH, HEIGHT = 6.0, 4.0
"""Of a figure, in inches."""


@dataclass(frozen=True)
class Look:
    """How one line is drawn.

    Attributes:
        color: one of the palette.
        line: matplotlib's line style.
        marker: matplotlib's marker.
        width: of the line, in points.
        order: lines of a higher order are drawn over others.
    """

    color: str
    line: str
    marker: str
    width: float = 2.0
    order: float = 3.0

    def draw(self, axes: Axes, x: Sequence[float], y: Sequence[float], label: str | None = None) -> None:
        """Draw a line with a marker at each point."""
        axes.plot(
            x,
            y,
            label=label,
            color=self.color,
            linestyle=self.line,
            marker=self.marker,
            linewidth=self.width,
            zorder=self.order,
            markersize=6,
            markeredgecolor=PAGE,
        )


def new_figure(draw: Callable[[Axes], None], *, title: str = "", columns: int = 2, height: float = HEIGHT) -> Figure:
    """A figure with one pair of axes.

    Args:
        draw: draws into the axes; lines with a label enter the legend.
        title: above the legend; none in a page that has a heading for the figure.
        columns: of the legend.
        height: in inches.
    """
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
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if not axes.get_legend_handles_labels()[0]:
            raise ValueError("no line has a label: nothing to name in the legend")
        # The title is the legend's: a title of the figure would be drawn over a legend outside the axes.
        figure.legend(
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.4,
            title=title or None,
            title_fontproperties={"size": 13, "weight": "bold"},
            alignment="left",
        )
        return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file of 864 pixels' width."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an SVG element, its text as outlines, so that it needs no font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def logarithmic_x(axes: Axes, label: str, ticks: Sequence[float]) -> None:
    """A logarithmic x axis with the given ticks; if the first is 0, it is linear up to the second. The label says which."""
    ticks = sorted(set(ticks))
    least = min((tick for tick in ticks if tick > 0), default=1)
    if ticks[0] == 0:
        axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.7)
        axes.set_xlabel(f"{label} (linear up to {least:,}, then logarithmic)")
        axes.set_xlim(-0.06 * least, 1.25 * ticks[-1])
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"{label} (logarithmic)")
        margin = (ticks[-1] / ticks[0]) ** 0.04 if len(ticks) > 1 else 2
        axes.set_xlim(ticks[0] / margin, ticks[-1] * margin)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def linear_y(axes: Axes, label: str) -> None:
    """A y axis that starts at 0."""
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.10g}")
    axes.set_ylabel(label)


def logarithmic_y(axes: Axes, label: str, form: str = ".0e") -> None:
    """A logarithmic y axis."""
    axes.set_yscale("log")
    powers_of_ten(axes.yaxis, form)
    axes.set_ylabel(f"{label} (logarithmic)")


def powers_of_ten(axis: Axis, form: str = ".0e") -> None:
    """Ticks of a logarithmic axis at powers of ten, written as numbers of the tables are: 1e-04, or with "," 1,000."""
    from matplotlib.ticker import NullLocator

    axis.set_major_formatter(lambda value, position: format(value, form))
    axis.set_minor_locator(NullLocator())
