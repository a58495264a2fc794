"""Draw the curves over steps: loss, metrics and throughput of one run, loss and a metric of several."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fnet_dist.run.console import figure as number_of
from jobs.report import style
from jobs.report.run_data import DatasetLabel, Floats, Integers, RunData
from jobs.report.statistics import run_stats
from jobs.text import number

CURVE_BINS = 150  # points of a curve; more are closer together than the picture's pixels can show
METRIC_AXES_MAX = 5  # beside the losses; the table has all metrics
RANK_CURVES_MAX = 16  # ranks with a curve of their own: more would cover each other
LETTER_WIDTH = 0.0155  # of an attempt's name, as a fraction of the axes: measured


class Binned(NamedTuple):
    """Groups of consecutive steps: their mean step, and their mean, lowest and highest value (bins[, columns])."""

    step: Floats
    mean: Floats
    low: Floats
    high: Floats


def bin_steps(step: Integers, values: Floats, bins: int) -> Binned:
    """Group `values` (steps[, columns]) into at most `bins` bins of consecutive steps, ignoring NaN."""
    starts = np.linspace(0, len(step), min(bins, len(step)), endpoint=False, dtype=np.int64)
    middle = np.add.reduceat(step, starts) / np.diff(starts, append=len(step))
    is_there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 in a group without a value: a rank that did not run in these steps
        mean = np.add.reduceat(np.where(is_there, values, 0), starts) / np.add.reduceat(is_there, starts, dtype=float)
    return Binned(middle, mean, np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts))


@rc_context(style.STYLE)
def draw_loss(run: RunData) -> Figure:
    """Draw the loss over steps: each rank's in colour, the mean of all ranks in black, epochs and attempts marked."""
    step, label = run.steps["step"], "step"
    figure = style.new_figure("Training loss", run.dataset, run.dir.name, 4.1)
    axes = figure.add_subplot()
    # Smooth a long curve over three steps at least: fewer would leave the noise and hide single steps all the same.
    bins = min(CURVE_BINS, len(step) // 3) if len(step) > CURVE_BINS else len(step)
    mean, ranks = bin_steps(step, run.steps["loss"], bins), bin_steps(step, run.steps["rank_loss"], bins)
    if bins < len(step):
        label += f"\neach point: mean of {len(step) / bins:,.0f} steps · grey: lowest to highest step"
        axes.fill_between(mean.step, mean.low, mean.high, color=style.PALE, linewidth=0)
    # Above the ranks, and with colour and line style of its own: it takes none from their cycle.
    axes.plot(*mean[:2], "-", color=style.INK, zorder=2.2, label=f"mean {mean.mean[-1]:.3f}")
    count = ranks.mean.shape[1]
    if count > RANK_CURVES_MAX:
        recorded = np.isfinite(ranks.mean).any(axis=1)  # above 64 ranks most lines have no losses per rank
        x, (low, middle, high) = ranks.step[recorded], np.nanquantile(ranks.mean[recorded], (0, 0.5, 1), axis=1)
        axes.fill_between(x, low, high, color=style.BLUE, alpha=0.22, linewidth=0)
        axes.plot(x, middle, color=style.BLUE, linewidth=1, label=f"{count} ranks:\nmedian, lowest\nto highest")
    elif count > 1:  # the mean of one rank is that rank
        names = [f"rank {rank}" for rank in range(count)]
        axes.plot(*ranks[:2], alpha=0.7, linewidth=1.2, markersize=2.5, label=names)
    style.set_x_axis(axes, label)
    _set_loss_axis(axes, mean.mean)
    _mark_epochs_and_attempts(axes, run)
    figure.legend(loc="outside right center")  # inside the axes, it would hide curves
    return figure


def _set_loss_axis(axes: Axes, values: Floats) -> None:
    """Let y begin at 0, or make it logarithmic if the loss falls far: else its tail would look flat."""
    values = values[np.isfinite(values)]
    low, high = values.min(initial=np.inf), values.max(initial=0)
    axes.set_ylabel("loss")
    if high > 4 * low > 0:
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif low >= 0:
        # A few single steps far above the rest may leave the axes: they would press the curve flat.
        axes.set_ylim(0, min(axes.get_ylim()[1], 2 * high) or 1)


def _mark_epochs_and_attempts(axes: Axes, run: RunData) -> None:
    """Draw a pale line where an epoch begins, and a dashed one where an attempt resumes the run.

    Name each epoch and attempt, with the reason why it began and its ranks if they changed, where there is room.
    """
    step, attempt, ranks = (run.steps[key] for key in ("step", "attempt", "world_size"))
    epochs, starts = np.unique(run.steps["epoch"], return_index=True)
    # Of many epochs, only those with round numbers; the first one always.
    round_numbers = MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]).tick_values(epochs[0], epochs[-1])
    shown = np.isin(epochs, round_numbers) | (starts == 0)
    begins = step[starts[shown]] - 0.5
    top = axes.secondary_xaxis("top")
    top.set_xticks(begins, [f"{epoch:,}" for epoch in epochs[shown]], size=8.5, ha="left")
    top.tick_params(pad=1)
    top.spines[:].set_visible(False)
    axes.annotate("epoch", (0, 1), (-4, 3), "axes fraction", "offset points", ha="right", size=8.5, color=style.GREY)
    whole_height = axes.get_xaxis_transform()  # x in steps, y in fractions of the axes
    axes.vlines(begins[1:], 0, 1, transform=whole_height, color=style.GREY, linewidth=0.7, alpha=0.45, zorder=0.5)
    low, high = axes.get_xlim()
    free_from = 0.0  # like the lengths below in fractions of the axes' width
    for index in np.flatnonzero(np.diff(attempt)) + 1:
        x = step[index] - 0.5
        axes.axvline(x, color=style.VERMILION, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2.5)
        size = "" if ranks[index] == ranks[index - 1] else f", {ranks[index]} rank{'s' if ranks[index] > 1 else ''}"
        lines = [f" attempt {attempt[index]}{size} ", f" after {run.ends.get(int(attempt[index]) - 1, 'a kill')} "]
        width, at = LETTER_WIDTH * max(map(len, lines)), (x - low) / (high - low)
        side, left = ("left", at) if at + width < 1 else ("right", at - width)
        if left >= free_from:
            text = axes.text(x, 0.97, "\n".join(lines), size=8.5, ha=side, va="top", transform=whole_height)
            text.set(color=style.VERMILION, bbox={"facecolor": "white", "linewidth": 0, "pad": 0, "alpha": 0.8})
            free_from = left + width


@rc_context(style.STYLE)
def draw_evaluations(run: RunData) -> Figure:
    """Draw each metric over the steps of its evaluations, and in the last axes test loss and mean training loss."""
    title = "Test data: metrics and loss" if run.metrics else "Loss on test data"
    shown = [*run.metrics][:METRIC_AXES_MAX]
    rows = -(-(len(shown) + 1) // 2)
    figure = style.new_figure(title, run.dataset, run.dir.name, 0.9 + 2.7 * rows)
    grid = figure.subplots(rows, min(2, len(shown) + 1), squeeze=False).flatten()
    *of_metrics, last = grid[: len(shown) + 1]
    for unused in grid[len(shown) + 1 :]:
        unused.remove()
    steps = [line["step"] for line in run.evaluations]
    for name, axes in zip(shown, of_metrics, strict=True):
        values = [line["metrics"].get(name) for line in run.evaluations]
        known = [value for value in values if value is not None]
        best = max if run.metrics[name] == "higher" else min
        text = f"{name} {number_of(known[-1])}, best {number_of(best(known))}" if known else name
        axes.plot(steps, [np.nan if value is None else value for value in values], label=text)
    losses = [line["loss"] for line in run.evaluations]
    last.plot(steps, losses, label=f"test loss {losses[-1]:.3f}")
    if run.epochs:
        train = [line["train_loss"] for line in run.epochs]
        last.plot([line["step"] for line in run.epochs], train, label=f"train {train[-1]:.3f}")
    for axes in (*of_metrics, last):
        style.set_x_axis(axes, "step")
        axes.margins(y=0.15)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=2)
    return figure


@rc_context(style.STYLE)
def draw_throughput(run: RunData) -> Figure:
    """Draw samples per second over steps, and as a dotted line their mean over all training time."""
    windows, mean = run.windows, run_stats(run)["samples/s"]
    figure = style.new_figure("Throughput", run.dataset, run.dir.name, 3.4)
    axes = figure.add_subplot()
    count = len(windows["seconds"])
    starts = np.linspace(0, count, min(CURVE_BINS, count), endpoint=False, dtype=np.int64)
    # Samples over seconds, as in run_stats: a mean of rates would count short windows as much as long ones.
    samples = np.add.reduceat(windows["samples_per_second"] * windows["seconds"], starts)
    rate = samples / np.add.reduceat(windows["seconds"], starts)
    edges = [*(windows["first_step"][starts] - 1), windows["last_step"][-1]]
    axes.stairs(rate, edges, color=style.BLUE, fill=True, alpha=0.15)
    axes.stairs(rate, edges, color=style.BLUE, linewidth=1.6, baseline=None)
    style.set_x_axis(axes, "step")
    axes.axhline(mean, color=style.INK, linewidth=1, linestyle=":", label=f"mean\n{number(mean)}")
    axes.set_ylabel("samples/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 1.3 * rate.max())  # with room for the names of attempts above the curve
    if run.steps["step"].size:
        _mark_epochs_and_attempts(axes, run)
    figure.legend(loc="outside right center")  # inside the axes, it would hide curves
    return figure


def compare_loss(runs: Sequence[RunData], names: Sequence[str], dataset: DatasetLabel) -> Figure:
    """Draw the training loss of several runs over steps; `names` and `dataset` label them."""
    curves = [
        bin_steps(run.steps["step"], run.steps["loss"], 90)[:2] if run.steps["step"].size else ([], []) for run in runs
    ]
    figure = _draw_comparison("Training loss", "step", dataset, names, curves)
    _set_loss_axis(figure.axes[0], np.concatenate([loss for _, loss in curves]))
    return figure


def compare_metric(runs: Sequence[RunData], names: Sequence[str], dataset: DatasetLabel) -> Figure:
    """Draw the monitored metric of the first run, over steps, of all runs that have it."""
    monitor = runs[0].monitor
    curves = []
    for run in runs:
        points = [
            (line["step"], line["loss"] if monitor == "loss" else line["metrics"].get(monitor))
            for line in run.evaluations
        ]
        known = [point for point in points if point[1] is not None]
        curves.append([[x for x, _ in known], [y for _, y in known]])
    figure = _draw_comparison(f"Test {monitor}", "step", dataset, names, curves)
    figure.axes[0].set_ylabel(f"test {monitor}")
    return figure


@rc_context(style.STYLE)
def _draw_comparison(
    title: str, x_label: str, dataset: DatasetLabel, names: Sequence[str], curves: Sequence[Any]
) -> Figure:
    columns = 2 if max(map(len, names)) <= 34 else 1  # each half as wide as the picture
    rows = math.ceil(len(names) / columns)
    figure = style.new_figure(title, dataset, f"{len(curves)} runs", 3.7 + 0.2 * rows)
    axes = figure.add_subplot()
    for name, (x, y) in zip(names, curves, strict=True):
        # A run without points yet is plotted too: it takes its colour, so that a run has the same one in both pictures.
        axes.plot(x, y, label=style.shorten(name, 72) if np.size(x) else "_")
    style.set_x_axis(axes, x_label)
    figure.legend(loc="outside lower left", ncols=columns)  # long names would leave no width for the curves
    return figure
