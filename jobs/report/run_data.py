"""Read what a report shows of a run: its metrics log as arrays, and the other files of its directory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.outcome import Outcome, read_outcome
from fnet_dist.run.run_dir import RunDir, read_json

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class DatasetLabel(NamedTuple):
    """A data set's name. `is_synthetic` makes every page and picture warn that this is not the real data."""

    name: str
    is_synthetic: bool


@dataclass(frozen=True)
class Steps:
    """The train lines as arrays of shape (steps,). `rank_loss` (steps, ranks) is NaN where a rank has no loss."""

    step: Integers
    epoch: Integers
    attempt: Integers
    world_size: Integers
    loss: Floats
    rank_loss: Floats


@dataclass(frozen=True)
class Windows:
    """The window lines as arrays of shape (windows,).

    `seconds` is the time that the window's steps took. `slowest_rank` is NaN where no rank was named,
    `max_over_median` where nothing was measured.
    """

    first_step: Integers
    last_step: Integers
    samples_per_second: Floats
    seconds: Floats
    slowest_rank: Floats
    max_over_median: Floats


@dataclass(frozen=True)
class Predictions:
    """Classes of all test images (images,), and `thumbnails` (some, height, width[, channels]) uint8 of a few.

    `thumbnail_index` gives each thumbnail's place among the test images.
    """

    true: Integers
    predicted: Integers
    thumbnails: npt.NDArray[np.uint8]
    thumbnail_index: Integers
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of one run.

    `ends` maps an attempt's number to why it ended; an attempt that was killed has no entry. `started` and `last_seen`
    are the Unix times in seconds of the first and last train line, None before there is one.
    """

    dir: RunDir
    config: dict[str, Any]
    manifest: dict[str, Any]
    dataset: DatasetLabel
    outcome: Outcome | None
    steps: Steps
    windows: Windows
    epochs: list[dict[str, Any]]
    predictions: Predictions | None
    ends: dict[int, str]
    started: float | None
    last_seen: float | None


def read_run_data(run: RunDir) -> RunData:
    """Read everything in `run` that a report shows. What is not there yet is empty or None."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "window": [], "epoch": []}
    rank_loss: list[Floats] = []
    for line in metrics_log.read(run.metrics_log):
        if line["kind"] == "train":
            # Packed line by line: as Python floats, the rank losses of a long run would fill the memory.
            rank_loss.append(np.array(line.pop("loss_per_rank") or [], dtype=np.float64))
        if line["kind"] in lines:
            lines[line["kind"]].append(line)
    manifest = read_json(run.manifest) or {}
    dataset = manifest.get("dataset", {})
    train = lines["train"]
    return RunData(
        dir=run,
        config=read_json(run.config) or {},
        manifest=manifest,
        dataset=DatasetLabel(str(dataset.get("name") or "data set not recorded"), bool(dataset.get("stand_in"))),
        outcome=read_outcome(run),
        steps=_steps(train, rank_loss),
        windows=_windows(lines["window"]),
        epochs=lines["epoch"],
        predictions=_predictions(run, dataset.get("class_names") or ()),
        ends={each.number: end["reason"] for each in list_attempts(run) if (end := read_json(each.end)) is not None},
        started=train[0]["time"] if train else None,
        last_seen=train[-1]["time"] if train else None,
    )


def _integers(lines: list[dict[str, Any]], key: str) -> Integers:
    return np.array([line[key] for line in lines], dtype=np.int64)


def _floats(lines: list[dict[str, Any]], key: str) -> Floats:
    return np.array([line[key] for line in lines], dtype=np.float64)  # None becomes NaN


def _steps(lines: list[dict[str, Any]], rank_loss: list[Floats]) -> Steps:
    sizes = np.array([len(row) for row in rank_loss], dtype=np.int64)
    padded = np.full((len(lines), sizes.max(initial=0)), np.nan)
    for row, values in zip(padded, rank_loss, strict=True):
        row[: len(values)] = values
    # Above 64 ranks most lines have no losses per rank: such a step ran on as many ranks as the last line that has.
    recorded = np.maximum.accumulate(np.where(sizes > 0, np.arange(len(sizes)), 0))
    return Steps(
        step=_integers(lines, "step"),
        epoch=_integers(lines, "epoch"),
        attempt=_integers(lines, "attempt"),
        world_size=sizes[recorded],
        loss=_floats(lines, "loss"),
        rank_loss=padded,
    )


def _windows(lines: list[dict[str, Any]]) -> Windows:
    first, last = _integers(lines, "first_step"), _integers(lines, "last_step")
    return Windows(
        first_step=first,
        last_step=last,
        samples_per_second=_floats(lines, "samples_per_second"),
        seconds=(last - first + 1) * _floats(lines, "step_ms") / 1000,
        slowest_rank=_floats(lines, "slowest_rank"),
        max_over_median=_floats(lines, "max_over_median"),
    )


def _predictions(run: RunDir, names: tuple[str, ...]) -> Predictions | None:
    if not run.predictions.is_file():
        return None
    tensors = load_file(run.predictions)
    true, predicted = tensors["true"].astype(np.int64), tensors["predicted"].astype(np.int64)
    # A user's own data set may name fewer classes than its labels have.
    classes = max(len(names), *(int(each.max(initial=-1)) + 1 for each in (true, predicted)))
    return Predictions(
        true=true,
        predicted=predicted,
        # Only images have thumbnails: other inputs leave both out.
        thumbnails=tensors.get("thumbnails", np.zeros((0, 1, 1), dtype=np.uint8)),
        thumbnail_index=tensors.get("thumbnail_index", np.zeros(0)).astype(np.int64),
        class_names=(*names, *(f"class {number}" for number in range(len(names), classes))),
    )
