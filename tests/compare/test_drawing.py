"""The style of all figures: what is above the axes stays above them, and an axis says what its scale is."""

from __future__ import annotations

import pytest

from retnet_export.compare import drawing
from retnet_export.compare.drawing import BLUE, VERMILION, WIDTH, Look

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
PHONE_PIXELS = 390


def draw(axes):
    for look, name in ((Look(BLUE, "-", "o"), "RetNet"), (Look(VERMILION, "--", "s"), "Transformer")):
        look.draw(axes, (1, 2, 4), (30, 10, 20), name)
    drawing.logarithmic_x(axes, "tokens", (1, 2, 4))
    drawing.linear_y(axes, "ms")


def test_title_and_legend_stand_above_the_axes_and_inside_the_figure():
    figure = drawing.new_figure(draw, title="Time per token")
    drawing.png(figure)  # lays it out
    (legend,), (axes,) = figure.legends, figure.axes
    assert legend.get_title().get_text() == "Time per token"
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_text_has_ten_pixels_on_a_phone():
    figure = drawing.new_figure(draw)
    (axes,) = figure.axes
    texts = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *figure.legends[0].get_texts()]
    assert min(text.get_fontsize() for text in texts) * PHONE_PIXELS / (72 * WIDTH) >= 10


@pytest.mark.parametrize(
    ("ticks", "label"),
    [((128, 512, 2048), "tokens (logarithmic)"), ((0, 512, 2048), "tokens (linear up to 512, then logarithmic)")],
)
def test_an_axis_says_what_its_scale_is(ticks, label):
    def draw(axes):
        Look(BLUE, "-", "o").draw(axes, ticks, ticks, "RetNet")
        drawing.logarithmic_x(axes, "tokens", ticks)

    figure = drawing.new_figure(draw)
    (axes,) = figure.axes
    assert axes.get_xlabel() == label
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{tick:,}" for tick in ticks]
