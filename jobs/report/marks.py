"""What is marked along the steps of a run: where an epoch and where another attempt begins."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jobs.report.run_data import Integers, Steps
from jobs.report.style import GREY, VERMILION

STRIDES = [first * 10**zeros for zeros in range(9) for first in (1, 2, 5)]
ABOVE: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "size": 8.5, "color": GREY}


def _starts(values: Integers) -> list[int]:
    """Indices at which the value differs from the one before."""
    return [int(index) for index in np.flatnonzero(np.diff(values)) + 1]


def mark_epochs(axes: Axes, steps: Steps) -> None:
    """Pale lines where epochs begin, their numbers above; every second, fifth, tenth … where there are many."""
    starts = [0, *_starts(steps.epoch)]
    stride = next(stride for stride in STRIDES if len(starts) / stride <= 10)
    low, high = axes.get_xlim()
    axes.annotate("epoch", (0, 1), xytext=(-4, 3), ha="right", **ABOVE)
    for index in starts:
        step, epoch = float(steps.step[index]), int(steps.epoch[index])
        if index and epoch % stride:
            continue
        if index:
            axes.axvline(step - 0.5, color=GREY, linewidth=0.7, alpha=0.45, zorder=0.5)
        if high - step > 0.04 * (high - low) or not index:
            place = axes.transAxes.inverted().transform(axes.transData.transform((step - 0.5, 0.5)))[0]
            axes.annotate(f"{epoch:,}", (place, 1), xytext=(3 if index else 0, 3), **ABOVE)


def mark_attempts(axes: Axes, steps: Steps, ends: Mapping[int, str]) -> None:
    """Dashed lines where another attempt goes on; where there is room named, with its ranks if they changed and with
    what ended the one before."""
    low, high = axes.get_xlim()
    free_from = low
    for index in _starts(steps.attempt):
        step, ranks = float(steps.step[index]), int(steps.world_size[index])
        axes.axvline(step - 0.5, color=VERMILION, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2.5)
        word = f"attempt {steps.attempt[index]}"
        if ranks != steps.world_size[index - 1]:
            word += f", {ranks} {'rank' if ranks == 1 else 'ranks'}"
        why = f" after {ends.get(int(steps.attempt[index]) - 1, 'a kill')}"
        for text in (word + why, word):
            width = 0.0155 * len(text) * (high - low)
            right = step + width < high
            if (step if right else step - width) >= free_from:
                break
        else:
            continue
        axes.annotate(
            text,
            (step - 0.5, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top",
            size=8.5,
            color=VERMILION,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
        free_from = step + width if right else step
