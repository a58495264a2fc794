"""The pictures that compare runs: loss over steps, accuracy per epoch."""

from matplotlib.figure import Figure

from jobs.report.plots import set_loss_axis
from jobs.report.run_data import RunData
from jobs.report.statistics import DataSet
from jobs.report.style import (
    COLOURS,
    STYLE,
    EndLabel,
    bin_steps,
    count_axis,
    label_ends,
    new_figure,
    percent_axis,
    shorten,
    styled,
)

CURVE_BINS = 90


@styled(STYLE)
def draw_loss(runs: list[tuple[str, RunData]], data: DataSet) -> Figure:
    """Loss over steps, one curve for each (name, run); `data` says what they were trained on."""
    figure = new_figure("Training loss", data, f"{len(runs)} runs", 4.0)
    axes = figure.add_subplot()
    labels, curves = [], []
    for place, (name, record) in enumerate(runs):
        if not record.steps.step.size:
            continue
        colour, line = run_look(place)
        curve = bin_steps(record.steps.step, record.steps.loss, CURVE_BINS)
        marker = "o" if len(curve.step) == 1 else None
        axes.plot(curve.step, curve.mean, color=colour, linestyle=line, linewidth=1.7, marker=marker)
        labels.append(EndLabel(float(curve.mean[-1]), shorten(name, 26), colour, bold=True))
        curves.append(curve)
    count_axis(axes, "step")
    set_loss_axis(axes, *curves)
    label_ends(axes, labels, 2.9)
    return figure


@styled(STYLE)
def draw_accuracy(runs: list[tuple[str, RunData]], data: DataSet) -> Figure:
    """Test accuracy per epoch, one curve for each (name, run)."""
    figure = new_figure("Test accuracy", data, f"{len(runs)} runs", 3.6)
    axes = figure.add_subplot()
    labels = []
    for place, (name, record) in enumerate(runs):
        if not record.epochs:
            continue
        colour, line = run_look(place)
        epoch = [row["epoch"] for row in record.epochs]
        accuracy = [row["test_accuracy"] for row in record.epochs]
        marker = "o" if len(epoch) <= 30 else None
        axes.plot(epoch, accuracy, color=colour, linestyle=line, linewidth=1.7, marker=marker, markersize=4)
        labels.append(EndLabel(accuracy[-1], shorten(name, 26), colour, bold=True))
    count_axis(axes, "epoch")
    axes.set_ylabel("test accuracy")
    percent_axis(axes)
    label_ends(axes, labels, 2.5)
    return figure


def run_look(place: int) -> tuple[str, str]:
    """Colour and line style of the run at `place`: the first 24 differ."""
    return COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
