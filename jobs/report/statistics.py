"""Compute the statistics of a run, and write them as text."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.report.run_data import Columns, Integers, RunData
from jobs.text import NONE, number


@dataclass(frozen=True)
class ClassFigures:
    """One class: fractions from 0 to 1, None if it was never predicted (precision) or has no images (recall)."""

    name: str
    precision: float | None
    recall: float | None
    count: int
    taken_for: str | None
    taken_for_count: int


@dataclass(frozen=True)
class RunStats:
    """A run's statistics, None where there is none yet; losses and accuracy are those of the last complete epoch.

    `samples_per_second` is the mean over all training time; `world_size` shows each change ("2 → 4").
    """

    epochs: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    samples_per_second: float | None
    world_size: str


def run_stats(run: RunData) -> RunStats:
    """Compute a run's statistics from its metrics log."""
    last: dict[str, Any] = run.epochs[-1] if run.epochs else {"epoch": 0}
    seconds = run.windows["seconds"]
    sizes = run.steps["world_size"]
    changes = sizes[np.flatnonzero(np.diff(sizes, prepend=-1))].tolist()
    if not changes and "world_size" in run.manifest:
        changes = [run.manifest["world_size"]]  # before the first step
    return RunStats(
        last["epoch"],
        *(last.get(key) for key in ("train_loss", "test_loss", "test_accuracy")),
        float(np.average(run.windows["samples_per_second"], weights=seconds)) if seconds.size else None,
        " → ".join(f"{size:,}" for size in changes) or NONE,
    )


def summarize(run: RunData, stats: RunStats) -> dict[str, str]:
    """Return the summary that the page and the terminal show, in order: label -> text."""
    # Before the first epoch has ended there is no mean training loss: show the last step's.
    in_first_epoch = stats.train_loss is None
    loss = run.steps["loss"][-1] if in_first_epoch and run.steps["loss"].size else stats.train_loss
    return {
        "data set": run.dataset.name,
        "epochs": number(stats.epochs),
        "loss of the last step" if in_first_epoch else "train loss": number(loss, 4),
        "test loss": number(stats.test_loss, 4),
        "test accuracy": percent(stats.test_accuracy),
        "samples/s": number(stats.samples_per_second),
        "world size": stats.world_size,
        "slowest rank": _slowest_rank(run.windows),
        "device": str(run.manifest.get("device", "not recorded")),
        "end": _end(run),
    }


def _slowest_rank(windows: Columns) -> str:
    slowest, ratio = windows["slowest_rank"], windows["max_over_median"]
    if not np.isfinite(ratio).any():
        return NONE
    # One slow window is noise: show the rank that was named most often, with its median ratio.
    ranks, counts = np.unique(slowest[np.isfinite(slowest)], return_counts=True)
    if not ranks.size:
        return "none"
    rank = ranks[counts.argmax()]
    named = f"rank {rank:,.0f} in {counts.max():,} of {len(slowest):,} windows"
    return f"{named}, {np.median(ratio[slowest == rank]):.2g} × the median rank's time"


def _end(run: RunData) -> str:
    if (outcome := run.outcome) is None:
        return f"not ended: last step recorded {moment(run.steps['time'][-1] if run.steps['time'].size else None)}"
    why = "" if outcome["status"] == "finished" else f": {outcome['reason']} (exit code {outcome['exit_code']})"
    return f"{outcome['status']} at step {outcome['step']:,} of epoch {outcome['epoch']:,}{why}"


def confusion(true: Integers, predicted: Integers, classes: int) -> Integers:
    """Count images by true class (row) and predicted class (column), as an array (classes, classes)."""
    counts: npt.NDArray[np.int64] = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def per_class(counts: Integers, class_names: tuple[str, ...]) -> list[ClassFigures]:
    """Compute each class's precision, recall and most frequent mistake from the counts of `confusion`."""
    mistakes = counts - np.diag(counts.diagonal())
    columns = (counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1), mistakes.argmax(axis=1), mistakes.max(axis=1))
    return [
        ClassFigures(
            name=name,
            precision=right / predicted if predicted else None,
            recall=right / images if images else None,
            count=images,
            taken_for=class_names[worst] if mistaken else None,
            taken_for_count=mistaken,
        )
        for name, right, predicted, images, worst, mistaken in zip(
            class_names, *(column.tolist() for column in columns), strict=True
        )
    ]


def percent(fraction: float | None) -> str:
    """Return 0.8731 as "87.31 %"."""
    return NONE if fraction is None else f"{100 * fraction:.2f} %"


def setting_text(value: object) -> str:
    """Return a setting's value as job files and command lines spell it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def moment(time: float | None) -> str:
    """Return a Unix time in seconds as date and minute in UTC, or "never"."""
    return "never" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
