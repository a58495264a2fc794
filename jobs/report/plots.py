"""Draw the curves over steps and epochs: loss, accuracy and throughput of one run, loss and accuracy of several."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from jobs.report.run_data import DatasetLabel, Floats, Integers, RunData
from jobs.report.statistics import percent, run_stats
from jobs.report.style import (
    ABOVE,
    BESIDE,
    BLUE,
    COLOURS,
    GREY,
    INK,
    PALE,
    STYLE,
    VERMILION,
    marker_for,
    new_figure,
    set_x_axis,
    shorten,
)
from jobs.text import number

CURVE_BINS = 150  # points of a curve; more are closer together than the picture's pixels can show
RANK_CURVES_MAX = 16  # ranks with a curve of their own: more would cover each other
NAMED_RANKS_MAX = 4  # ranks with a colour of their own


class Binned(NamedTuple):
    """Groups of consecutive steps: their mean step, and their mean, lowest and highest value (bins[, columns])."""

    step: Floats
    mean: Floats
    low: Floats
    high: Floats


def bin_steps(step: Integers, values: Floats, bins: int) -> Binned:
    """Group `values` (steps[, columns]) into at most `bins` bins of consecutive steps, ignoring NaN."""
    bins = min(bins, len(step))
    groups = np.array_split(values, bins)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        # numpy warns of a group without any value: a rank that did not run in these steps. Its mean is NaN.
        mean = np.array([np.nanmean(group, axis=0) for group in groups])
    return Binned(
        step=np.array([group.mean() for group in np.array_split(step, bins)]),
        mean=mean,
        low=np.array([np.fmin.reduce(group, axis=0) for group in groups]),
        high=np.array([np.fmax.reduce(group, axis=0) for group in groups]),
    )


@rc_context(STYLE)
def draw_loss(run: RunData) -> Figure:
    """Draw the loss over steps: each rank's in colour, the mean of all ranks in black, epochs and attempts marked."""
    step, loss = run.steps["step"], run.steps["loss"]
    figure = new_figure("Training loss", run.dataset, run.dir.name, 4.1)
    axes = figure.add_subplot()
    # Smooth a long curve over three steps at least: fewer would leave the noise and hide single steps all the same.
    bins = min(CURVE_BINS, len(step) // 3) if len(step) > CURVE_BINS else len(step)
    mean, ranks = bin_steps(step, loss, bins), bin_steps(step, run.steps["rank_loss"], bins)
    label = "step"
    if bins < len(step):
        label += f"\neach point: mean of {len(step) / bins:,.0f} steps"
        if ranks.mean.shape[1] <= RANK_CURVES_MAX:  # above, a band of the ranks would cover it
            axes.fill_between(mean.step, mean.low, mean.high, color=PALE, linewidth=0)
            label += " · grey: lowest to highest step"
    last = mean.mean[np.isfinite(mean.mean)][-1:]
    name = f"mean {last[0]:.3f}" if last.size else "mean"
    axes.plot(mean.step, mean.mean, color=INK, marker=marker_for(len(step)), zorder=2.2, label=name)
    _draw_ranks(axes, ranks)
    set_x_axis(axes, label)
    if len(step) == 1:
        axes.set_xlim(step[0] - 1, step[0] + 1)
    _set_loss_axis(axes, mean.mean, spikes=mean.high)
    _mark_epochs(axes, run)
    _mark_attempts(axes, run)
    axes.legend(**BESIDE)
    return figure


def _draw_ranks(axes: Axes, ranks: Binned) -> None:
    count = ranks.mean.shape[1]
    if count > RANK_CURVES_MAX:
        recorded = np.isfinite(ranks.mean).any(axis=1)
        step, (low, middle, high) = ranks.step[recorded], np.nanquantile(ranks.mean[recorded], (0, 0.5, 1), axis=1)
        axes.fill_between(step, low, high, color=BLUE, alpha=0.22, linewidth=0)
        axes.plot(step, middle, color=BLUE, linewidth=1, label=f"{count} ranks:\nmedian, lowest\nto highest")
    elif count > NAMED_RANKS_MAX:
        labels = [f"ranks 0–{count - 1}", *["_"] * (count - 1)]  # "_" keeps a line out of the legend
        axes.plot(ranks.step, ranks.mean, "-", color=BLUE, alpha=0.3, linewidth=0.8, label=labels)
    elif count > 1:  # the mean of one rank is that rank
        marker = marker_for(len(ranks.step))
        labels = [f"rank {rank}" for rank in range(count)]
        axes.set_prop_cycle(color=COLOURS)
        axes.plot(ranks.step, ranks.mean, alpha=0.7, linewidth=1.2, marker=marker, markersize=2.5, label=labels)


def _set_loss_axis(axes: Axes, values: Floats, spikes: Floats | None = None) -> None:
    """Let y begin at 0, or make it logarithmic if the loss falls far: else its tail would look flat."""
    values = values[np.isfinite(values)]
    axes.set_ylabel("loss")
    if not values.size or values.min() < 0:
        return
    if values.max() > 4 * values.min() > 0:
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if values.max() > 20 * values.min() else (1, 2, 3, 4, 6))
        )
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="both", length=0)
    else:
        # A few single steps far above the rest may leave the axes: they would press the curve flat.
        top = max(values.max(), 0 if spikes is None else np.nanquantile(spikes, 0.97))
        axes.set_ylim(0, 1.08 * top or 1)


def _mark_epochs(axes: Axes, run: RunData) -> None:
    """Draw a pale line where an epoch begins, with its number above: at round numbers where there are many."""
    step, epoch = run.steps["step"], run.steps["epoch"]
    round_numbers = MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]).tick_values(epoch[0], epoch[-1])
    starts = np.flatnonzero(np.diff(epoch, prepend=-1))
    shown = [index for index in starts if index == 0 or epoch[index] in round_numbers]
    top = axes.secondary_xaxis("top")
    top.set_xticks(step[shown] - 0.5, [f"{epoch[index]:,}" for index in shown], size=8.5, ha="left")
    top.tick_params(length=0, pad=1)
    top.spines[:].set_visible(False)
    axes.annotate("epoch", (0, 1), (-4, 3), "axes fraction", "offset points", ha="right", size=8.5, color=GREY)
    for index in shown[1:]:
        axes.axvline(step[index] - 0.5, color=GREY, linewidth=0.7, alpha=0.45, zorder=0.5)


def _mark_attempts(axes: Axes, run: RunData) -> None:
    """Draw a dashed line where an attempt resumes the run. Where there is room, name it, its ranks and the reason."""
    attempt, ranks = run.steps["attempt"], run.steps["world_size"]
    low, high = axes.get_xlim()
    free_from = 0.0  # like all lengths below in fractions of the axes' width
    for index in np.flatnonzero(np.diff(attempt)) + 1:
        step = run.steps["step"][index] - 0.5
        axes.axvline(step, color=VERMILION, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2.5)
        size = "" if ranks[index] == ranks[index - 1] else f", {ranks[index]} rank{'s' if ranks[index] > 1 else ''}"
        lines = [f"attempt {attempt[index]}{size}", f"after {run.ends.get(int(attempt[index]) - 1, 'a kill')}"]
        width = 0.0155 * max(map(len, lines))  # of a character at this size: measured
        at = (step - low) / (high - low)
        side = 1 if at + width < 1 else -1
        if min(at, at + side * width) < free_from:
            continue
        text = axes.annotate("\n".join(lines), (at, 0.97), (4 * side, 0), "axes fraction", "offset points", va="top")
        text.set(ha="left" if side > 0 else "right", size=8.5, color=VERMILION)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
        free_from = max(at, at + side * width)


@rc_context(STYLE)
def draw_accuracy(run: RunData) -> Figure:
    """Draw the test accuracy, and beside it the training and test loss, of each epoch."""
    figure = new_figure("Test accuracy and loss per epoch", run.dataset, run.dir.name, 3.6)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    epoch, accuracy, train, test = (
        [line[key] for line in run.epochs] for key in ("epoch", "test_accuracy", "train_loss", "test_loss")
    )
    marker = marker_for(len(epoch))
    best = int(np.argmax(accuracy))
    left.plot(epoch, accuracy, marker=marker, label=f"test accuracy {percent(accuracy[-1])}")
    if accuracy[best] > accuracy[-1]:
        label = f"best {percent(accuracy[best])}"
        left.plot(epoch[best], accuracy[best], "o", color=BLUE, markersize=9, markerfacecolor="none", label=label)
    left.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    right.plot(epoch, test, marker=marker, label=f"test loss {test[-1]:.3f}")
    right.plot(epoch, train, marker=marker, label=f"train {train[-1]:.3f}")
    for axes in (left, right):
        set_x_axis(axes, "epoch")
        axes.margins(x=0.05, y=0.15)
        axes.legend(**ABOVE)
        if len(epoch) == 1:
            axes.set_xlim(epoch[0] - 1, epoch[0] + 1)
            axes.set_xticks(epoch)
    return figure


@rc_context(STYLE)
def draw_throughput(run: RunData) -> Figure:
    """Draw samples per second over steps, and as a dotted line their mean over all training time."""
    windows = run.windows
    figure = new_figure("Throughput", run.dataset, run.dir.name, 3.4)
    axes = figure.add_subplot()
    groups = np.array_split(np.arange(len(windows["seconds"])), min(CURVE_BINS, len(windows["seconds"])))
    # Samples over seconds, as in run_stats: a mean of rates would count short windows as much as long ones.
    seconds = np.array([windows["seconds"][group].sum() for group in groups])
    samples = np.array([(windows["samples_per_second"] * windows["seconds"])[group].sum() for group in groups])
    rate = np.divide(samples, seconds, out=np.zeros_like(samples), where=seconds > 0)
    edges = [*(windows["first_step"][group[0]] - 1 for group in groups), windows["last_step"][-1]]
    axes.stairs(rate, edges, color=BLUE, fill=True, alpha=0.15)
    axes.stairs(rate, edges, color=BLUE, linewidth=1.6, baseline=None)
    set_x_axis(axes, "step")
    axes.set_ylabel("samples/s")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(0, 1.3 * rate.max() or 1)  # with room for the names of attempts above the curve
    mean = run_stats(run).samples_per_second
    if mean is not None:
        axes.axhline(mean, color=INK, linewidth=1, linestyle=":")
        at = axes.get_yaxis_transform()  # x in fractions of the axes, y in samples/s
        axes.text(1.01, mean, f"mean\n{number(mean)}", transform=at, va="center", size=9, weight="bold")
    if run.steps["step"].size:
        _mark_epochs(axes, run)
        _mark_attempts(axes, run)
    return figure


def compare_loss(runs: Sequence[RunData], names: Sequence[str], dataset: DatasetLabel) -> Figure:
    """Draw the training loss of several runs over steps; `names` and `dataset` label them."""
    curves: list[tuple[Floats, Floats]] = []
    for run in runs:
        has_steps = run.steps["step"].size > 0
        curves.append(bin_steps(run.steps["step"], run.steps["loss"], 90)[:2] if has_steps else (np.empty(0),) * 2)
    figure = _draw_comparison("Training loss", "step", dataset, names, curves)
    _set_loss_axis(figure.axes[0], np.concatenate([loss for _, loss in curves]))
    return figure


def compare_accuracy(runs: Sequence[RunData], names: Sequence[str], dataset: DatasetLabel) -> Figure:
    """Draw the test accuracy of several runs over epochs; `names` and `dataset` label them."""
    curves = [
        (np.array([line["epoch"] for line in run.epochs]), np.array([line["test_accuracy"] for line in run.epochs]))
        for run in runs
    ]
    figure = _draw_comparison("Test accuracy", "epoch", dataset, names, curves)
    figure.axes[0].set_ylabel("test accuracy")
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return figure


@rc_context(STYLE)
def _draw_comparison(
    title: str, x_label: str, dataset: DatasetLabel, names: Sequence[str], curves: Sequence[tuple[Floats, Floats]]
) -> Figure:
    figure = new_figure(title, dataset, f"{len(curves)} runs", 4.0)
    axes = figure.add_subplot()
    for name, (x, y) in zip(names, curves, strict=True):
        # A run without points yet is plotted too: it takes its colour, so that a run has the same one in both pictures.
        axes.plot(x, y, marker=marker_for(len(x)), label=shorten(name, 26) if len(x) else "_")
    set_x_axis(axes, x_label)
    axes.legend(**BESIDE)
    return figure
