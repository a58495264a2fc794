"""Compute the statistics of a run, and write them as text."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from fnet_dist.run.console import figure
from fnet_dist.run.metrics_log import is_better
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


def run_stats(run: RunData) -> dict[str, Any]:
    """Compute a run's statistics from its metrics log, as {label: value}; a value is None where there is none yet."""
    last = run.epochs[-1] if run.epochs else {}  # the last complete epoch
    evaluation = run.evaluations[-1] if run.evaluations else {"metrics": {}}
    windows, sizes = run.windows, run.steps["world_size"]
    changes = sizes[np.flatnonzero(np.diff(sizes, prepend=-1))].tolist()
    if not changes and "world_size" in run.manifest:
        changes = [run.manifest["world_size"]]  # before the first step
    # Samples over seconds: a mean of rates would count short windows as much as long ones.
    seconds, speed = windows["seconds"], windows["samples_per_second"]
    return {
        "epochs": last.get("epoch", 0),
        "train loss": last.get("train_loss"),
        "test loss": evaluation.get("loss"),
        **{f"test {name}": evaluation["metrics"].get(name) for name in run.metrics},
        "samples/s": np.average(speed, weights=seconds) if seconds.size else None,
        "world size": " → ".join(f"{size:,}" for size in changes) or NONE,
    }


def summarize(run: RunData) -> dict[str, str]:
    """Return the summary that the page and the terminal show, in order: label -> text."""
    stats = run_stats(run)
    labels, loss = {label: label for label in stats}, run.steps["loss"]
    if stats["train loss"] is None:
        # Before the first epoch has ended there is no mean training loss: show the last step's.
        labels["train loss"], stats["train loss"] = "loss of the last step", loss[-1] if loss.size else None
    return {
        "data set": run.dataset.name,
        **{labels[label]: stat_text(label, value) for label, value in stats.items()},
        "best": _best(run),
        "time": run.bottleneck or NONE,
        "slowest rank": _slowest_rank(run.windows),
        "device": str(run.manifest.get("device", "not recorded")),
        "end": _end(run),
    }


def stat_text(label: str, value: Any) -> str:
    """Return a value of `run_stats` as text."""
    if label == "world size":
        return str(value)
    return number(value) if label in ("epochs", "samples/s") else figure(value)


def _best(run: RunData) -> str:
    """Return the best evaluation by run.monitor: "accuracy 0.8637 at step 1,876 of epoch 2"."""
    better, best = run.metrics.get(run.monitor, "lower"), None
    for line in run.evaluations:
        value = line["loss"] if run.monitor == "loss" else line["metrics"].get(run.monitor)
        if best is None or is_better(value, best[0], better):
            best = value, line
    if best is None:
        return NONE
    return f"{run.monitor} {figure(best[0])} at step {best[1]['step']:,} of epoch {best[1]['epoch']:,}"


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
    """Count images by true class (row) and predicted class (column), as an array (classes, classes).

    A target below 0 is no class: a loss may ignore it.
    """
    cells = (true * classes + predicted)[true >= 0]
    counts: npt.NDArray[np.int64] = np.bincount(cells, minlength=classes * classes)
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


def moment(time: float | None) -> str:
    """Return a Unix time in seconds as date and minute in UTC, or "never"."""
    return "never" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
