"""The look of every picture: colours, frame and labels. The colours are Okabe and Ito's, safe for colour-blind eyes."""

from io import BytesIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from jobs.report.run_data import Floats, Integers
from jobs.report.statistics import DataSet

WIDTH = 5.7  # inches: 855 pixels at 150 dots per inch, the width of the page's text; less, and a phone shows more
DPI = 150
INK, GREY, PALE = "#1f2933", "#616e7c", "#e4e7eb"
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
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
}
styled = matplotlib.rc_context


class EndLabel(NamedTuple):
    """A curve's name beside its last value."""

    value: float
    text: str
    colour: str
    bold: bool = False


def new_figure(title: str, data: DataSet, run_name: str, height: float = 3.6) -> Figure:
    """An empty figure, `height` in inches, with its title and, below it, the data set and the run."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0.005, 0.01, 0.985, 1 - 0.66 / height))
    left = 0.09 / WIDTH
    figure.text(left, 1 - 0.10 / height, title, size=13, weight="bold", va="top")
    figure.text(
        left,
        1 - 0.37 / height,
        f"{data.words} · {shorten(run_name, 32)}",
        size=9.5,
        va="top",
        color=VERMILION if data.is_synthetic else GREY,
        weight="bold" if data.is_synthetic else "normal",
    )
    return figure


@styled(STYLE)
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def shorten(text: str, length: int) -> str:
    """`text` on one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def class_labels(names: tuple[str, ...], length: int = 16) -> list[str]:
    """Class names as they can be drawn: short, and as a number where the font lacks a character."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return [
        shorten(name, length) if all(ord(letter) in known for letter in name if not letter.isspace()) else f"class {i}"
        for i, name in enumerate(names)
    ]


def percent_axis(axes: Axes) -> None:
    """Shares on y, as percent with the digits that the ticks need."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))


def count_axis(axes: Axes, name: str) -> None:
    """Whole numbers with thousands separators on x, one pale line per tick on y."""
    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.margins(x=0.02)


def label_ends(axes: Axes, labels: list[EndLabel], height: float) -> None:
    """Write each curve's name right of the axes (`height` inches high) at its last value, apart where they meet."""
    axes.get_ylim()  # settles the limits, which are lazy
    labels = sorted((label for label in labels if np.isfinite(label.value)), key=lambda label: label.value)
    gap = 0.165 / height
    at: list[float] = []
    for label in labels:
        wanted = axes.transAxes.inverted().transform(axes.transData.transform((0, label.value)))[1]
        at.append(max(wanted, at[-1] + gap) if at else wanted)
    # Pushed up only, a crowd would climb out of the axes: give half of it back.
    down = max(0.0, at[-1] - 1) if at else 0.0
    for label, y in zip(labels, at, strict=True):
        axes.annotate(
            label.text,
            (1, y - down),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=label.colour,
            weight="bold" if label.bold else "normal",
            size=9,
            annotation_clip=False,
        )


class Binned(NamedTuple):
    """Consecutive steps summed up: their middle, and mean, lowest and highest value, each (bins[, columns])."""

    step: Floats
    mean: Floats
    low: Floats
    high: Floats


def bin_steps(step: Integers, values: Floats, bins: int) -> Binned:
    """Sum up (steps[, columns]) into at most `bins` groups of consecutive steps, leaving nan out."""
    starts = np.unique(np.linspace(0, len(step), min(bins, len(step)), endpoint=False).astype(np.int64))
    there = np.isfinite(values)
    counts = np.add.reduceat(there.astype(np.float64), starts, axis=0)
    totals = np.add.reduceat(np.where(there, values, 0.0), starts, axis=0)
    return Binned(
        step=np.add.reduceat(step.astype(np.float64), starts) / np.diff(starts, append=len(step)),
        mean=np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0),
        low=np.fmin.reduceat(values, starts, axis=0),
        high=np.fmax.reduceat(values, starts, axis=0),
    )
