"""The pictures over steps and epochs: loss, accuracy, throughput."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

from jobs.report.marks import mark_attempts, mark_epochs
from jobs.report.run_data import Floats, RunData
from jobs.report.statistics import data_set, percent, run_stats
from jobs.report.style import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    PALE,
    STYLE,
    VERMILION,
    Binned,
    EndLabel,
    bin_steps,
    count_axis,
    label_ends,
    new_figure,
    percent_axis,
    styled,
)
from jobs.text import number

CURVE_BINS = 150
LINES_UP_TO = 16  # ranks; above, one line each would be a smear
NAMED_UP_TO = 4


@styled(STYLE)
def draw_loss(record: RunData) -> Figure:
    """Loss over steps: each rank faint, their mean bold; epochs and new attempts marked."""
    steps = record.steps
    figure = new_figure("Training loss", data_set(record), record.run.name, 4.1)
    axes = figure.add_subplot()
    count = len(steps.step)
    bins = min(CURVE_BINS, count // 3) if count > CURVE_BINS else count
    mean, ranks = bin_steps(steps.step, steps.loss, bins), bin_steps(steps.step, steps.rank_loss, bins)
    notes = []
    if bins < count:
        notes.append(f"black: mean of {count / bins:,.0f} steps each")
    if ranks.mean.shape[1] > LINES_UP_TO:
        labels = _rank_band(axes, ranks)
        notes.append("blue: lowest, median and highest rank")
    else:
        if bins < count:
            axes.fill_between(mean.step, mean.low, mean.high, color=PALE, linewidth=0)
            notes.append("grey: lowest to highest step")
        labels = _rank_lines(axes, ranks)
    axes.plot(mean.step, mean.mean, color=INK, linewidth=1.7, marker="o" if count <= 30 else None, markersize=4)
    labels.append(EndLabel(last := _last(mean.mean), f"mean {last:.3f}", INK, bold=True))
    count_axis(axes, "\n".join(["step", " · ".join(notes)]) if notes else "step")
    if count == 1:
        axes.set_xlim(steps.step[0] - 1, steps.step[0] + 1)
    set_loss_axis(axes, mean)
    mark_epochs(axes, steps)
    mark_attempts(axes, steps, record.ends)
    label_ends(axes, labels, 2.7)
    return figure


def _last(values: Floats) -> float:
    there = values[np.isfinite(values)]
    return float(there[-1]) if there.size else float("nan")


def _rank_band(axes: Axes, ranks: Binned) -> list[EndLabel]:
    there = np.isfinite(ranks.mean).any(axis=1)
    step, values = ranks.step[there], ranks.mean[there]
    low, high = np.fmin.reduce(values, axis=1), np.fmax.reduce(values, axis=1)
    middle = np.nanmedian(values, axis=1)
    axes.fill_between(step, low, high, color=BLUE, alpha=0.22, linewidth=0)
    axes.plot(step, middle, color=BLUE, linewidth=1)
    return [EndLabel(_last(middle), f"{values.shape[1]} ranks", BLUE)]


def _rank_lines(axes: Axes, ranks: Binned) -> list[EndLabel]:
    count = ranks.mean.shape[1]
    if count == 1:
        return []  # the mean is that rank
    if count <= NAMED_UP_TO:
        for rank in range(count):
            axes.plot(ranks.step, ranks.mean[:, rank], color=COLOURS[rank], alpha=0.7, linewidth=1.2)
        return [EndLabel(_last(ranks.mean[:, rank]), f"rank {rank}", COLOURS[rank]) for rank in range(count)]
    axes.plot(ranks.step, ranks.mean, color=BLUE, alpha=0.3, linewidth=0.8)
    highest = max(_last(ranks.mean[:, rank]) for rank in range(count))
    return [EndLabel(highest, f"ranks 0–{count - 1}", BLUE)]


def set_loss_axis(axes: Axes, *curves: Binned) -> None:
    """A loss axis from 0, or a logarithmic one where the loss falls far: its tail is what people look at."""
    values = np.concatenate([curve.mean for curve in curves])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > 4:
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 3, 4, 6) if values.max() / values.min() < 20 else (1, 2, 5))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="both", length=0)
        return
    axes.set_ylabel("loss")
    if values.size and values.min() >= 0:
        # A few single steps far above the rest may leave the axes: they would press the curve flat.
        top = max(values.max(), *(np.nanquantile(curve.high, 0.97) for curve in curves))
        axes.set_ylim(0, 1.08 * top or 1)


@styled(STYLE)
def draw_accuracy(record: RunData) -> Figure:
    """Test accuracy, and training and test loss, per epoch, side by side."""
    figure = new_figure("Test accuracy and loss per epoch", data_set(record), record.run.name)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    epoch = [line["epoch"] for line in record.epochs]
    marker = "o" if len(epoch) <= 30 else None
    accuracy = [line["test_accuracy"] for line in record.epochs]
    best = int(np.argmax(accuracy))
    left.plot(epoch, accuracy, color=BLUE, linewidth=2, marker=marker, markersize=5)
    percent_axis(left)
    labels = [EndLabel(accuracy[-1], percent(accuracy[-1]), BLUE, bold=True)]
    if accuracy[best] > accuracy[-1]:
        left.plot(epoch[best], accuracy[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=BLUE)
        left.annotate(
            f"best {percent(accuracy[best])}",
            (epoch[best], accuracy[best]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            size=9,
            color=BLUE,
        )
    _epoch_axis(left, epoch)
    left.margins(x=0.05, y=0.15)
    left.set_title("test accuracy", loc="left", size=9.5, color=GREY)
    label_ends(left, labels, 2.2)
    ends = []
    for key, name, colour in (("train_loss", "train", VERMILION), ("test_loss", "test", BLUE)):
        values = [line[key] for line in record.epochs]
        right.plot(epoch, values, color=colour, linewidth=2, marker=marker, markersize=5)
        ends.append(EndLabel(values[-1], f"{name} {values[-1]:.3f}", colour, bold=True))
    _epoch_axis(right, epoch)
    right.margins(x=0.05, y=0.15)
    right.set_title("loss", loc="left", size=9.5, color=GREY)
    label_ends(right, ends, 2.2)
    return figure


def _epoch_axis(axes: Axes, epoch: list[int]) -> None:
    count_axis(axes, "epoch")
    if len(epoch) == 1:
        axes.set_xlim(epoch[0] - 1, epoch[0] + 1)
        axes.set_xticks(epoch)


@styled(STYLE)
def draw_throughput(record: RunData) -> Figure:
    """Samples per second of each window over steps, from 0; the dotted line is the mean over all training time."""
    windows = record.windows
    figure = new_figure("Throughput", data_set(record), record.run.name, 3.4)
    axes = figure.add_subplot()
    # Windows are joined by time, not by count: samples over seconds is what passed.
    count = len(windows.last_step)
    starts = np.unique(np.linspace(0, count, min(CURVE_BINS, count), endpoint=False).astype(np.int64))
    samples = np.add.reduceat(windows.samples_per_second * windows.seconds, starts)
    seconds = np.add.reduceat(windows.seconds, starts)
    rate = np.divide(samples, seconds, out=np.zeros_like(samples), where=seconds > 0)
    edges = np.append(windows.first_step[starts] - 1, windows.last_step[-1])
    axes.stairs(rate, edges, color=BLUE, fill=True, alpha=0.15)
    axes.stairs(rate, edges, color=BLUE, linewidth=1.6, baseline=None)
    mean = run_stats(record).samples_per_second
    count_axis(axes, "step")
    axes.set_ylabel("samples/s")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(0, max(float(rate.max()), 1e-9) * 1.15)
    if mean is not None:
        axes.axhline(mean, color=INK, linewidth=1, linestyle=":")
        label_ends(axes, [EndLabel(mean, f"mean\n{number(mean)}", INK, bold=True)], 2.3)
    if record.steps.step.size:
        mark_epochs(axes, record.steps)
        mark_attempts(axes, record.steps, record.ends)
    return figure
