"""Set the look that all pictures share: size, colours, title and the axis of steps or epochs."""

from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from jobs.report.run_data import DatasetLabel

WIDTH = 5.7  # inches: 855 pixels at 150 dots per inch, the width of the page's text
DPI = 150
INK, GREY, PALE = "#1f2933", "#616e7c", "#e4e7eb"
# The colours of Okabe and Ito (https://jfly.uni-koeln.de/color), which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
COLOURS = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#4b4b4b")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a class may be named "$5"
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    # 24 lines differ: all colours solid, then dashed, then dotted.
    "axes.prop_cycle": cycler(linestyle=("-", "--", ":")) * cycler(color=COLOURS),
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": "linecolor",
    "legend.handlelength": 1,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
}
# Legends outside the axes: inside, they would hide curves.
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.05, 1), "ncols": 2, "columnspacing": 0.8}


def new_figure(title: str, dataset: DatasetLabel, runs: str, height: float) -> Figure:
    """Create an empty figure, `height` in inches, with a title and below it the data set and the run or runs."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    # Figure.suptitle is one text of one colour, so the two lines are placed by hand above the layout's rectangle.
    figure.set_layout_engine("constrained", rect=(0.005, 0.01, 0.985, 1 - 0.66 / height))
    figure.text(0.016, 1 - 0.10 / height, title, size=13, weight="bold", va="top")
    below = figure.text(0.016, 1 - 0.37 / height, f"{dataset.name} · {shorten(runs, 32)}", va="top", color=GREY)
    if dataset.is_synthetic:
        below.set(color=VERMILION, weight="bold")
    return figure


def to_png(figure: Figure) -> bytes:
    """Render the figure as a PNG file."""
    buffer = BytesIO()
    with rc_context(STYLE):  # ticks are made only now
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def shorten(text: str, length: int) -> str:
    """Return `text` on one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def class_labels(names: tuple[str, ...], length: int = 16) -> list[str]:
    """Shorten class names; one with characters that the font lacks becomes "class 3" instead of empty boxes."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return [
        shorten(name, length) if all(ord(letter) in known or letter.isspace() for letter in name) else f"class {index}"
        for index, name in enumerate(names)
    ]


def set_x_axis(axes: Axes, label: str) -> None:
    """Put whole numbers with thousands separators on x, and one pale line per tick on y."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.margins(x=0.02)


def marker_for(points: int) -> str | None:
    """Return "o" for a curve of few points: a single one would be no line at all."""
    return "o" if points <= 30 else None
