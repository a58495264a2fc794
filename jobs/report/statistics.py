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
    """A run's statistics, None where there is none yet.

    `epochs` and `steps` count those completed; losses and accuracy are those of the last complete epoch.
    `samples_per_second` is the mean over all training time; `world_size` shows each change ("2 → 4").
    """

    epochs: int
    steps: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    samples_per_second: float | None
    training_seconds: float
    world_size: str


def run_stats(run: RunData) -> RunStats:
    """Compute a run's statistics from its metrics log."""
    last: dict[str, Any] = run.epochs[-1] if run.epochs else {}
    windows = run.windows
    seconds = float(windows["seconds"].sum())
    samples = float((windows["samples_per_second"] * windows["seconds"]).sum())
    sizes = run.steps["world_size"]
    changes = sizes[np.flatnonzero(np.diff(sizes, prepend=-1))].tolist()
    if not changes and "world_size" in run.manifest:
        changes = [run.manifest["world_size"]]
    return RunStats(
        epochs=last.get("epoch", 0),
        steps=int(run.steps["step"].max(initial=0)),
        train_loss=last.get("train_loss"),
        test_loss=last.get("test_loss"),
        test_accuracy=last.get("test_accuracy"),
        samples_per_second=samples / seconds if seconds > 0 else None,
        training_seconds=seconds,
        world_size=" → ".join(f"{size:,}" for size in changes) or NONE,
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
    if not np.isfinite(windows["max_over_median"]).any():
        return NONE
    # One slow window is noise: show the rank that was named most often, with its median ratio.
    ranks, counts = np.unique(windows["slowest_rank"][np.isfinite(windows["slowest_rank"])], return_counts=True)
    if not ranks.size:
        return "none"
    rank = ranks[counts.argmax()]
    ratio = np.median(windows["max_over_median"][windows["slowest_rank"] == rank])
    named = f"rank {rank:,.0f} in {counts.max():,} of {len(windows['slowest_rank']):,} windows"
    return f"{named}, {ratio:.2g} × the median rank's time"


def _end(run: RunData) -> str:
    outcome = run.outcome
    if outcome is None:
        times = run.steps["time"]
        return f"not ended: last step recorded {moment(times[-1] if times.size else None)}"
    where = f"at step {outcome['step']:,} of epoch {outcome['epoch']:,}"
    if outcome["status"] == "finished":
        return f"finished {where}"
    return f"{outcome['status']} {where}: {outcome['reason']} (exit code {outcome['exit_code']})"


def confusion(true: Integers, predicted: Integers, classes: int) -> Integers:
    """Count images by true class (row) and predicted class (column), as an array (classes, classes)."""
    counts: npt.NDArray[np.int64] = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def per_class(counts: Integers, class_names: tuple[str, ...]) -> list[ClassFigures]:
    """Compute each class's precision, recall and most frequent mistake from the counts of `confusion`."""
    images, predicted = counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist()
    correct = counts.diagonal().tolist()
    mistakes = counts - np.diag(correct)
    worst = mistakes.argmax(axis=1)
    return [
        ClassFigures(
            name=name,
            precision=correct[index] / predicted[index] if predicted[index] else None,
            recall=correct[index] / images[index] if images[index] else None,
            count=images[index],
            taken_for=class_names[worst[index]] if mistakes[index].any() else None,
            taken_for_count=int(mistakes[index].max()),
        )
        for index, name in enumerate(class_names)
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
