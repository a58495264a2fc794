"""The pictures of a run's predictions: the confusion matrix, and test images with their classes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jobs.report.run_data import Floats, Integers, Predictions, RunData
from jobs.report.statistics import confusion, data_set
from jobs.report.style import GREY, INK, STYLE, VERMILION, WIDTH, class_labels, new_figure, styled

NUMBERS_UP_TO = 20  # classes; above, a cell is too small for one
NAMES_UP_TO = 40
COLUMNS = 6
BLUES = LinearSegmentedColormap.from_list("blues", ["#f5f7fa", "#cfe3f1", "#7fb5d8", "#2f86bd", "#0a5687"])


@styled(STYLE)
def draw_confusion(record: RunData, predictions: Predictions) -> Figure:
    """Confusion matrix: colour is the share of the true class's images, the number in a cell counts them."""
    classes = len(predictions.class_names)
    counts = confusion(predictions.true, predictions.predicted, classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure("Confusion matrix", data_set(record), record.run.name, 5.7)
    axes = figure.add_subplot()
    # The square root lifts the mistakes: one in a hundred would be as white as none.
    image = axes.imshow(np.sqrt(share), cmap=BLUES, vmin=0, vmax=1, interpolation="antialiased", aspect="equal")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    if classes <= NAMES_UP_TO:
        labels = class_labels(predictions.class_names)
        size = 9 if classes <= 12 else 7
        axes.set_xticks(range(classes), labels, rotation=40, ha="right", rotation_mode="anchor", size=size, color=INK)
        axes.set_yticks(range(classes), labels, size=size, color=INK)
    if classes <= NUMBERS_UP_TO:
        _write_counts(axes, counts, share)
        axes.spines[:].set_visible(False)
    else:
        bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("share of the true class")
        bar.set_ticks([0, 0.1, 0.1**0.5, 0.5, 1], labels=["0 %", "1 %", "10 %", "25 %", "100 %"])
    return figure


def _write_counts(axes: Axes, counts: Integers, share: Floats) -> None:
    classes = len(counts)
    longest = len(f"{counts.max():,}")
    size = min(9.5, 290 / classes / (0.68 * longest))
    for row in range(classes):
        for column in range(classes):
            if counts[row, column]:
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]:,}",
                    ha="center",
                    va="center",
                    size=size,
                    color="white" if share[row, column] > 0.3 else INK,
                    weight="bold" if row == column else "normal",
                )
    for edge in range(classes + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
        axes.axvline(edge - 0.5, color="white", linewidth=1)


@styled(STYLE)
def draw_images(record: RunData, predictions: Predictions) -> Figure:
    """Test images with their predicted class; a wrong one has a thick frame, a cross and its true class."""
    index = predictions.thumbnail_index
    true, predicted = predictions.true[index], predictions.predicted[index]
    rows = -(-len(index) // COLUMNS)
    cell = (WIDTH - 0.2) / COLUMNS
    right = int((true == predicted).sum())
    figure = new_figure(
        f"Test images: {right} of {len(index)} right", data_set(record), record.run.name, 0.75 + rows * (cell + 0.24)
    )
    axes = figure.add_subplot()
    step = 1 + 0.24 / cell  # rows are as far apart as an image is high, and its two lines of text
    names = class_labels(predictions.class_names, 11)
    images = predictions.thumbnails
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    for place, picture in enumerate(images):
        x, y = place % COLUMNS, place // COLUMNS * step
        axes.imshow(
            picture, cmap="gray", vmin=0, vmax=255, extent=(x + 0.1, x + 0.9, y + 0.8, y), interpolation="nearest"
        )
        wrong = true[place] != predicted[place]
        if wrong:
            axes.add_patch(Rectangle((x + 0.1, y), 0.8, 0.8, fill=False, edgecolor=VERMILION, linewidth=3.5))
        axes.text(
            x + 0.5,
            y + 0.86,
            f"{'✗' if wrong else '✓'} {names[predicted[place]]}",
            ha="center",
            va="top",
            size=8.2,
            color=VERMILION if wrong else INK,
            weight="bold" if wrong else "normal",
        )
        if wrong:
            axes.text(x + 0.5, y + 1.02, f"is: {names[true[place]]}", ha="center", va="top", size=8.2, color=GREY)
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(rows * step, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure
