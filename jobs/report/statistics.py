"""The figures and sentences that a report says about a run."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.report.run_data import Integers, RunData, Windows
from jobs.text import NONE


@dataclass(frozen=True)
class ClassFigures:
    """One class: shares from 0 to 1, None where nothing was predicted (precision) or nothing is there (recall)."""

    name: str
    precision: float | None
    recall: float | None
    count: int
    taken_for: str | None
    taken_for_count: int


@dataclass(frozen=True)
class RunStats:
    """A run in figures; None where there is none yet. `samples_per_second` is the mean over all training time,
    `world_size` says how it changed: "2 → 4".
    """

    epochs: int
    steps: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    samples_per_second: float | None
    training_seconds: float
    world_size: str
    slowest_rank: str


@dataclass(frozen=True)
class DataSet:
    """What a run was trained on, in words, and whether it stands in for the real data: that is always said loudly."""

    words: str
    is_synthetic: bool


def data_set(record: RunData) -> DataSet:
    """The data set as manifest.json records it."""
    found = record.manifest.get("dataset", {})
    return DataSet(str(found.get("name") or "data set not recorded"), bool(found.get("stand_in")))


def run_stats(record: RunData) -> RunStats:
    """The run's figures, from its ledger."""
    last: dict[str, Any] = record.epochs[-1] if record.epochs else {}
    windows = record.windows
    seconds = float(windows.seconds.sum())
    samples = float((windows.samples_per_second * windows.seconds).sum())
    sizes = record.steps.world_size
    changes = sizes[np.flatnonzero(np.diff(sizes, prepend=-1))].tolist()
    if not changes and "world_size" in record.manifest:
        changes = [record.manifest["world_size"]]
    return RunStats(
        epochs=last.get("epoch", 0),
        steps=int(record.steps.step[-1]) if record.steps.step.size else 0,
        train_loss=last.get("train_loss"),
        test_loss=last.get("test_loss"),
        test_accuracy=last.get("test_accuracy"),
        samples_per_second=samples / seconds if seconds > 0 else None,
        training_seconds=seconds,
        world_size=" → ".join(f"{size:,}" for size in changes) or NONE,
        slowest_rank=_slowest_rank(windows),
    )


def _slowest_rank(windows: Windows) -> str:
    """The rank that was named most often, in how many windows and how slow it was in their middle."""
    if not np.isfinite(windows.max_over_median).any():
        return NONE
    named = windows.slowest_rank[windows.slowest_rank >= 0]
    if not named.size:
        return "none"
    rank = int(np.bincount(named).argmax())
    there = windows.slowest_rank == rank
    ratio = float(np.median(windows.max_over_median[there]))
    return f"rank {rank:,} in {there.sum():,} of {there.size:,} windows, {ratio:.2g} × the median rank's time"


def ending(record: RunData) -> str:
    """How the run ended, in one sentence."""
    outcome = record.outcome
    if outcome is None:
        return f"not ended: last step recorded {moment(record.last_seen)}"
    where = f"at step {outcome['step']:,} of epoch {outcome['epoch']:,}"
    if outcome["status"] == "finished":
        return f"finished {where}"
    return f"{outcome['status']} {where}: {outcome['reason']} (exit code {outcome['exit_code']})"


def confusion(true: Integers, predicted: Integers, classes: int) -> Integers:
    """Counts (classes, classes): row the true class, column the predicted one."""
    counts: npt.NDArray[np.int64] = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def per_class(counts: Integers, class_names: tuple[str, ...]) -> list[ClassFigures]:
    """Precision, recall and the most frequent mistake of each class, from the counts of `confusion`."""
    images, predicted = counts.sum(axis=1), counts.sum(axis=0)
    right = counts.diagonal()
    mistakes = counts - np.diag(right)
    rows = []
    for number, name in enumerate(class_names):
        worst = int(mistakes[number].argmax())
        often = int(mistakes[number, worst])
        rows.append(
            ClassFigures(
                name=name,
                precision=float(right[number] / predicted[number]) if predicted[number] else None,
                recall=float(right[number] / images[number]) if images[number] else None,
                count=int(images[number]),
                taken_for=class_names[worst] if often else None,
                taken_for_count=often,
            )
        )
    return rows


def percent(share: float | None) -> str:
    """0.8731 as "87.31 %"."""
    return NONE if share is None else f"{100 * share:.2f} %"


def moment(time: float | None) -> str:
    """Unix time as date and minute, UTC."""
    return "never" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
