"""Read what a report shows of a run: its metrics log as arrays, and the other files of its directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.attempt_table import AttemptRow, Trained, count_window, tabulate_attempts
from fnet_dist.run.outcome import Outcome, read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.bottleneck import describe_bottleneck

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[Any]]

# Keys of the metrics log's lines that a report shows, with the type of their column.
TRAIN_COLUMNS = {"step": int, "epoch": int, "attempt": int, "loss": float, "time": float}
WINDOW_COLUMNS = {"first_step": int, "last_step": int, "samples_per_second": float, "step_ms": float}
SLOWEST_COLUMNS = {"slowest_rank": float, "max_over_median": float}  # NaN where no rank was slow


class DatasetLabel(NamedTuple):
    """A data set's name. `is_synthetic` makes every page and picture warn that this is not the real data."""

    name: str
    is_synthetic: bool


@dataclass(frozen=True)
class Predictions:
    """Classes of all test images (images,), and `thumbnails` (some, height, width[, channels]), 0 to 255, of a few.

    `thumbnail_index` gives each thumbnail's place among the test images.
    """

    true: Integers
    predicted: Integers
    thumbnails: npt.NDArray[Any]
    thumbnail_index: Integers
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of one run. Where nothing was measured, a float is NaN.

    `steps` has the train lines' columns, each of shape (steps,), with `world_size`, and `rank_loss` (steps, ranks).
    `windows` has the window lines' columns, each (windows,), with `seconds`: the time that the window's steps took.
    `epochs` and `evaluations` are the lines of these kinds, `metrics` says of each metric which direction is better,
    and `monitor` names the one that tells the best. `ends` maps an attempt's number to why it ended; an attempt that
    was killed has no entry.
    """

    dir: RunDir
    config: dict[str, Any]
    manifest: dict[str, Any]
    dataset: DatasetLabel
    outcome: Outcome | None
    steps: Columns
    windows: Columns
    epochs: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    metrics: dict[str, str]
    monitor: str
    predictions: Predictions | None
    ends: dict[int, str]
    bottleneck: str  # see describe_bottleneck
    attempts: list[AttemptRow]


def read_run_data(run: RunDir) -> RunData:
    """Read everything in `run` that a report shows. What is not there yet is empty or None."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "window": [], "epoch": [], "eval": []}
    rank_loss: list[Floats] = []
    trained: Trained = {}
    for line in metrics_log.read(run.metrics_log):
        if line["kind"] == "window":
            count_window(trained, line)
        if line["kind"] == "train":
            # Packed line by line: as Python floats, the rank losses of a long run would fill the memory.
            rank_loss.append(np.array(line.pop("loss_per_rank") or [], dtype=np.float64))
        if line["kind"] in lines:
            lines[line["kind"]].append(line)
    manifest, outcome = read_json(run.manifest) or {}, read_outcome(run)
    dataset = manifest.get("dataset", {})
    windows = _columns(lines["window"], WINDOW_COLUMNS | SLOWEST_COLUMNS)
    windows["seconds"] = (windows["last_step"] - windows["first_step"] + 1) * windows["step_ms"] / 1000
    return RunData(
        dir=run,
        config=read_json(run.config) or {},
        manifest=manifest,
        dataset=DatasetLabel(str(dataset.get("name") or "data set not recorded"), bool(dataset.get("stand_in"))),
        outcome=outcome,
        steps=_columns(lines["train"], TRAIN_COLUMNS) | _rank_columns(rank_loss),
        windows=windows,
        epochs=lines["epoch"],
        evaluations=lines["eval"],
        metrics=manifest.get("metrics", {"accuracy": "higher"}),  # those of format 1
        monitor=manifest.get("monitor", "accuracy"),
        predictions=_predictions(run, dataset.get("class_names") or ()),
        bottleneck=describe_bottleneck(lines["window"]),
        attempts=tabulate_attempts(run, trained, "not ended" if outcome is None else outcome["reason"]),
        ends={each.number: end["reason"] for each in list_attempts(run) if (end := each.read_end()) is not None},
    )


def _columns(lines: list[dict[str, Any]], types: Mapping[str, type]) -> Columns:
    return {key: np.array([line[key] for line in lines], dtype) for key, dtype in types.items()}


def _rank_columns(rank_loss: list[Floats]) -> Columns:
    sizes = np.array([len(row) for row in rank_loss], dtype=np.int64)
    padded = np.full((len(sizes), sizes.max(initial=0)), np.nan)
    for row, values in zip(padded, rank_loss, strict=True):
        row[: len(values)] = values
    # Above 64 ranks most lines have no losses per rank: such a step ran on as many ranks as the last line that has.
    recorded = np.maximum.accumulate(np.where(sizes > 0, np.arange(len(sizes)), 0))
    return {"world_size": sizes[recorded], "rank_loss": padded}


def _predictions(run: RunDir, names: tuple[str, ...]) -> Predictions | None:
    if not run.predictions.is_file():
        return None
    # Only images have thumbnails: other inputs leave both out.
    tensors = {"thumbnails": np.zeros((0, 1, 1)), "thumbnail_index": np.zeros(0)} | load_file(run.predictions)
    true, predicted, index = (tensors[key].astype(np.int64) for key in ("true", "predicted", "thumbnail_index"))
    index = index[: len(tensors["thumbnails"])]
    # A user's own data set may name fewer classes than its labels have.
    unnamed = range(len(names), max(true.max(initial=-1), predicted.max(initial=-1)) + 1)
    return Predictions(true, predicted, tensors["thumbnails"], index, (*names, *(f"class {each}" for each in unnamed)))
