"""Load the look that all pictures share, and make its parts: the title, and the axis of steps or epochs."""

from pathlib import Path

import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from jobs.report.run_data import DatasetLabel

WIDTH = 5.7  # inches: 855 pixels at 150 dots per inch, the width of the page's text
STYLE = rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
COLOURS = STYLE["axes.prop_cycle"].by_key()["color"][:8]  # after these the cycle repeats them with other lines
BLUE, VERMILION = COLOURS[:2]
INK, GREY, PALE = STYLE["text.color"], STYLE["axes.edgecolor"], STYLE["grid.color"]


def new_figure(title: str, dataset: DatasetLabel, runs: str, height: float) -> Figure:
    """Create an empty figure, `height` in inches, with a title and below it the data set and the run or runs."""
    figure = Figure(figsize=(WIDTH, height))
    # Figure.suptitle is one text of one colour, so the two lines are placed by hand above the layout's rectangle.
    figure.set_layout_engine("constrained", rect=(0.005, 0.01, 0.985, 1 - 0.66 / height))
    figure.text(0.016, 1 - 0.10 / height, title, size=13, weight="bold", va="top")
    below = figure.text(0.016, 1 - 0.37 / height, f"{dataset.name} · {shorten(runs, 32)}", va="top", color=GREY)
    if dataset.is_synthetic:
        below.set(color=VERMILION, weight="bold")
    return figure


def shorten(text: str, length: int) -> str:
    """Return `text` on one line of at most `length` characters."""
    text = " ".join(text.split())  # textwrap.shorten would drop a long word as a whole
    return text if len(text) <= length else text[: length - 1] + "…"


def class_labels(names: tuple[str, ...], length: int = 16) -> list[str]:
    """Shorten class names; one with characters that the font lacks becomes "class 3" instead of empty boxes."""
    known = get_font(findfont(FontProperties(family=STYLE["font.family"]))).get_charmap()
    return [
        shorten(name, length) if all(ord(letter) in known or letter.isspace() for letter in name) else f"class {index}"
        for index, name in enumerate(names)
    ]


def set_x_axis(axes: Axes, label: str) -> None:
    """Put whole numbers with thousands separators on x, one pale line per tick on y, and points on short curves."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    low, high = axes.dataLim.intervalx
    if np.isfinite((low, high)).all():  # there is a value
        margin = max(0.5, 0.02 * (high - low))  # a single step needs a width too
        axes.set_xlim(low - margin, high + margin)
    axes.grid(axis="y")
    for line in axes.lines:
        if np.size(line.get_xdata()) <= 30:  # a curve of one point would be no line at all
            line.set_marker("o")
