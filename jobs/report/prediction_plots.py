"""Draw a run's predictions: the confusion matrix, and test images with their predicted classes."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from jobs.report.run_data import Predictions, RunData
from jobs.report.statistics import confusion
from jobs.report.style import GREY, INK, STYLE, VERMILION, WIDTH, class_labels, new_figure

NUMBERED_CLASSES_MAX = 20  # above, a cell is too small for a number
NAMED_CLASSES_MAX = 40  # above, an axis is too short for the names
COLUMNS = 6  # thumbnails in a row
TEXT_HEIGHT = 0.24  # inches below each thumbnail: two lines of text


@rc_context(STYLE)
def draw_confusion(run: RunData, predictions: Predictions) -> Figure:
    """Draw the confusion matrix: a cell's number counts images, its colour is the fraction of the true class."""
    classes = len(predictions.class_names)
    counts = confusion(predictions.true, predictions.predicted, classes)
    fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a class without images is a white row
    figure = new_figure("Confusion matrix", run.dataset, run.dir.name, 5.7)
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    # The square root makes mistakes visible: on a linear scale, one image in a hundred is as white as none.
    image = axes.imshow(fraction, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="antialiased")
    if classes <= NAMED_CLASSES_MAX:
        labels, size = class_labels(predictions.class_names), 9 if classes <= 12 else 7
        axes.set_xticks(range(classes), labels, rotation=40, ha="right", rotation_mode="anchor", size=size, color=INK)
        axes.set_yticks(range(classes), labels, size=size, color=INK)
    if classes > NUMBERED_CLASSES_MAX:
        ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]  # evenly spaced ones would crowd: the scale is a square root
        bar = figure.colorbar(image, shrink=0.6, pad=0.02, ticks=ticks, format=PercentFormatter(1, 0, " %"))
        bar.set_label("fraction of the true class")
        return figure
    fit = min(9.5, 430 / classes / len(f"{counts.max():,}"))  # size of the widest number that fits its cell
    for (row, column), count in np.ndenumerate(counts):
        if count:
            text = axes.text(column, row, f"{count:,}", ha="center", va="center", size=fit)
            text.set(color="white" if fraction[row, column] > 0.3 else INK)
            text.set(weight="bold" if row == column else "normal")
    return figure


@rc_context(STYLE)
def draw_images(run: RunData, predictions: Predictions) -> Figure:
    """Draw test images with their predicted class. A wrong one has a thick frame, a cross and its true class."""
    true, predicted = (each[predictions.thumbnail_index] for each in (predictions.true, predictions.predicted))
    rows = -(-len(true) // COLUMNS)
    cell = (WIDTH - 0.2) / COLUMNS  # inches
    title = f"Test images: {(true == predicted).sum()} of {len(true)} right"
    figure = new_figure(title, run.dataset, run.dir.name, 0.75 + rows * (cell + TEXT_HEIGHT))
    # All images share one axes, whose unit is a cell's width: laying out 40 axes takes seconds.
    axes = figure.add_subplot()
    names = class_labels(predictions.class_names, 11)
    below: dict[str, Any] = {"ha": "center", "va": "top", "size": 8.2}
    for place, image in enumerate(predictions.thumbnails):
        x, y = place % COLUMNS, place // COLUMNS * (1 + TEXT_HEIGHT / cell)
        extent = (x + 0.1, x + 0.9, y + 0.8, y)
        # Squeezed, because imshow wants grey images without channels.
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
        if true[place] == predicted[place]:
            axes.text(x + 0.5, y + 0.86, f"✓ {names[predicted[place]]}", **below)
        else:
            axes.add_patch(Rectangle((x + 0.1, y), 0.8, 0.8, fill=False, edgecolor=VERMILION, linewidth=3.5))
            axes.text(x + 0.5, y + 0.86, f"✗ {names[predicted[place]]}", color=VERMILION, weight="bold", **below)
            axes.text(
                x + 0.5, y + 1.02, f"is: {names[true[place]] if true[place] >= 0 else 'ignored'}", color=GREY, **below
            )
    axes.set(xlim=(0, COLUMNS), ylim=(rows * (1 + TEXT_HEIGHT / cell), 0))
    axes.set_axis_off()
    return figure
