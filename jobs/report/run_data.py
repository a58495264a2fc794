"""What one run left in its directory, read once: the ledger as arrays, and the files beside it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from fnet_dist.run import metrics_log, run_dir
from fnet_dist.run.attempt import Attempt, last_attempt
from fnet_dist.run.outcome import Outcome, read_outcome
from fnet_dist.run.run_dir import RunDir

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """The ledger's train lines: arrays of one length; `rank_loss` (steps, ranks) has nan where a rank had none."""

    step: Integers
    epoch: Integers
    attempt: Integers
    world_size: Integers
    loss: Floats
    rank_loss: Floats


@dataclass(frozen=True)
class Windows:
    """The ledger's window lines: arrays of one length; `seconds` is the time its steps took. `slowest_rank` is -1 where
    no rank was named, `max_over_median` nan where nothing was measured."""

    first_step: Integers
    last_step: Integers
    samples_per_second: Floats
    seconds: Floats
    slowest_rank: Integers
    max_over_median: Floats


@dataclass(frozen=True)
class Predictions:
    """Each test image: `true`, `predicted` (images,); `thumbnails` (some, height, width[, channels]) uint8."""

    true: Integers
    predicted: Integers
    thumbnails: npt.NDArray[np.uint8]
    thumbnail_index: Integers
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class RunData:
    """One run. `started` and `last_seen` are Unix times of its first and last ledger line, None before there is one;
    `ends` is why each attempt ended, of those that could say so."""

    run: RunDir
    config: dict[str, Any]
    manifest: dict[str, Any]
    outcome: Outcome | None
    steps: Steps
    windows: Windows
    epochs: list[dict[str, Any]]
    predictions: Predictions | None
    ends: dict[int, str]
    started: float | None
    last_seen: float | None


def read_run_data(run: RunDir) -> RunData:
    """Read everything in `run` that a report shows; what is not there yet is empty or None."""
    train: list[dict[str, Any]] = []
    rank_loss: list[Floats] = []
    windows: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    times: list[float] = []
    for line in metrics_log.read(run.metrics_log):
        if line["kind"] == "train":
            # Packed at once: as Python floats, the ranks of a long run would fill the memory.
            rank_loss.append(np.array(line.pop("loss_per_rank") or [], dtype=np.float64))
            train.append(line)
            times = [*times[:1], line["time"]]
        elif line["kind"] == "window":
            windows.append(line)
        elif line["kind"] == "epoch":
            epochs.append(line)
    manifest = run_dir.read_json(run.manifest) or {}
    return RunData(
        run=run,
        config=run_dir.read_json(run.config) or {},
        manifest=manifest,
        outcome=read_outcome(run),
        steps=_steps(train, rank_loss),
        windows=_windows(windows),
        epochs=epochs,
        predictions=_predictions(run, manifest),
        ends=_ends(run),
        started=times[0] if times else None,
        last_seen=times[-1] if times else None,
    )


def _ends(run: RunDir) -> dict[int, str]:
    last = last_attempt(run)
    numbers = range(1, last.number + 1 if last else 1)
    ends = {number: run_dir.read_json(Attempt(run, number).end) for number in numbers}
    return {number: end["reason"] for number, end in ends.items() if end is not None}


def _integers(lines: list[dict[str, Any]], key: str) -> Integers:
    return np.array([line[key] for line in lines], dtype=np.int64)


def _sizes(rank_loss: list[Floats]) -> list[int]:
    """Ranks at each step; a step without their losses has as many as the one before (see ledger.TrainLine)."""
    sizes: list[int] = []
    for row in rank_loss:
        sizes.append(len(row) or (sizes[-1] if sizes else 0))
    return sizes


def _steps(lines: list[dict[str, Any]], rank_loss: list[Floats]) -> Steps:
    most = max((len(row) for row in rank_loss), default=0)
    padded = np.full((len(lines), most), np.nan)
    for row, values in zip(padded, rank_loss, strict=True):
        row[: len(values)] = values
    return Steps(
        step=_integers(lines, "step"),
        epoch=_integers(lines, "epoch"),
        attempt=_integers(lines, "attempt"),
        world_size=np.array(_sizes(rank_loss), dtype=np.int64),
        loss=np.array([line["loss"] for line in lines], dtype=np.float64),
        rank_loss=padded,
    )


def _windows(lines: list[dict[str, Any]]) -> Windows:
    first, last = _integers(lines, "first_step"), _integers(lines, "last_step")
    step_ms = np.array([line["step_ms"] for line in lines], dtype=np.float64)
    return Windows(
        first_step=first,
        last_step=last,
        samples_per_second=np.array([line["samples_per_second"] for line in lines], dtype=np.float64),
        seconds=(last - first + 1) * step_ms / 1000,
        slowest_rank=np.array([-1 if line["slowest_rank"] is None else line["slowest_rank"] for line in lines], int),
        max_over_median=np.array([line["max_over_median"] for line in lines], dtype=np.float64),
    )


def _predictions(run: RunDir, manifest: dict[str, Any]) -> Predictions | None:
    if not run.predictions.is_file():
        return None
    tensors = load_file(run.predictions)
    none = np.zeros((0, 1, 1), dtype=np.uint8)  # inputs that are no images have no thumbnails
    true, predicted = tensors["true"].astype(np.int64), tensors["predicted"].astype(np.int64)
    names = tuple(manifest.get("dataset", {}).get("class_names") or ())
    classes = max(len(names), int(true.max(initial=-1)) + 1, int(predicted.max(initial=-1)) + 1)
    return Predictions(
        true=true,
        predicted=predicted,
        thumbnails=tensors.get("thumbnails", none),
        thumbnail_index=tensors.get("thumbnail_index", np.zeros(0)).astype(np.int64),
        class_names=names + tuple(f"class {number}" for number in range(len(names), classes)),
    )
