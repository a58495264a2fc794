"""The metrics log, metrics.jsonl: one JSON object a line, each step once over all attempts.

All keys of a line are always present, null if nothing was measured. Other programs read them: do not rename one. Rank 0
appends. A resumed run may train steps again that the log holds: `MetricsReader` skips them, and no line is rewritten.
"""

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from fnet_dist.run.tail import FileTail


class TrainLine(TypedDict):
    """One optimizer step."""

    kind: Literal["train"]
    step: int
    epoch: int
    samples: int  # since the run's start
    loss: float  # mean over the global batch
    # Mean over each rank's local batch. Above MAX_RANK_CURVES ranks, to bound the size of the log, only every
    # `tracking.log_every_steps`-th step has it. The others have the three values below, which are null elsewhere.
    loss_per_rank: list[float | None] | None
    loss_min: float | None
    loss_max: float | None
    worst_rank: int | None
    lr: float
    grad_norm: float | None  # before clipping
    time: float  # Unix time in seconds
    attempt: int


TIME_SPREADS = ("data_ms", "compute_ms", "exchange_ms")
GPU_SPREADS = ("gpu_percent", "gpu_memory_gib", "gpu_watts", "gpu_celsius")


class Spread(TypedDict):
    """A figure of all ranks that have one."""

    min: float
    median: float  # of an even number of ranks, the lower of the two in the middle
    max: float
    max_rank: int
    by_rank: list[float | None] | None  # of more than eight ranks, None


class WindowLine(TypedDict):
    """The steps between two collectives, about half a second."""

    kind: Literal["window"]
    first_step: int
    last_step: int
    time: float
    samples_per_second: float
    step_ms: float
    slowest_rank: int | None
    max_over_median: float | None  # of the ranks' time for data and computation
    max_memory_gib: float
    world_size: int
    # A step's mean time before the optimizer's update, see StepTimes. None if no step was timed.
    data_ms: Spread | None
    compute_ms: Spread | None
    exchange_ms: Spread | None
    # Of each rank's GPU, by all processes. None without a GPU, or without nvidia-ml-py.
    gpu_percent: Spread | None
    gpu_memory_gib: Spread | None
    gpu_watts: Spread | None
    gpu_celsius: Spread | None
    attempt: int


class EvalLine(TypedDict):
    """One evaluation on the test data."""

    kind: Literal["eval"]
    step: int
    epoch: int
    loss: float
    metrics: dict[str, float | None]  # the recipe's, by name
    count: int  # samples
    seconds: float | None  # of the evaluation; None in a log of format 1
    attempt: int


class EpochLine(TypedDict):
    """The training of one epoch, after its evaluation; in a run that ends within an epoch, of its last part."""

    kind: Literal["epoch"]
    epoch: int
    step: int
    train_loss: float  # mean of the steps' losses
    seconds: float  # of training, without evaluation
    samples_per_second: float
    attempt: int


class PredictionsLine(TypedDict):
    """The predictions of the last evaluation are saved, for W&B; with tracking.log_predictions."""

    kind: Literal["predictions"]
    step: int
    epoch: int
    best_step: int  # of the best evaluation, whose predictions are saved too
    time: float
    attempt: int


class HashLine(TypedDict):
    """SHA-256 of each parameter after a step, in hex, every `parallel.hash_every_steps`; equal on all ranks."""

    kind: Literal["hash"]
    step: int
    weights: dict[str, str]
    attempt: int


_ENCODER = json.JSONEncoder(allow_nan=False)  # once: json.dumps with an option makes one for each line
Line = TrainLine | WindowLine | EvalLine | EpochLine | PredictionsLine | HashLine


def append(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Append all `lines` in one write, or none and raise OSError. A crash can tear the last line at most."""
    # All lines are encoded before the first byte is written: NaN in one of them raises ValueError and leaves no part.
    data = "".join(_ENCODER.encode(line) + "\n" for line in lines).encode()
    # O_APPEND: the position is the end of the file at each write, also if an earlier owner wakes up and writes too.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o660)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, data)
        if written < len(data):  # on a full disk, write(2) may write a part
            # Undo it, unless a new owner has appended meanwhile: its lines must not be cut off.
            if os.fstat(descriptor).st_size == size + written:
                os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def truncate_torn_line(path: Path, at: int = 0) -> None:
    """Remove a torn last line, looking from the line that begins at byte `at`."""
    log = FileTail(path, at)
    deque(log.read_lines(), maxlen=0)  # its offset is then the end of the last whole line
    with suppress(FileNotFoundError):
        os.truncate(path, log.offset)


def last_steps(path: Path) -> dict[str, int]:
    """Return the last step of the train, eval and epoch lines; 0 if there is none."""
    last = {line["kind"]: line["step"] for line in read(path) if line["kind"] in ("train", "eval", "epoch")}
    return {"train": 0, "eval": 0, "epoch": 0, **last}


def _lines_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `line`; of format 1, whose epoch lines held their evaluation, two lines of today's format."""
    if line["kind"] != "epoch" or "test_loss" not in line:
        return [line]
    test = {name: line.pop(name) for name in ("test_loss", "test_accuracy", "test_correct", "test_count")}
    evaluation = {
        "loss": test["test_loss"],
        "metrics": {"accuracy": test["test_accuracy"]},
        "count": test["test_count"],
    }
    shared = {name: line[name] for name in ("step", "epoch", "attempt")}
    return [{"kind": "eval", **shared, **evaluation, "seconds": None}, line]


@dataclass(frozen=True)
class LogPosition:
    """A place in a metrics log, and what a reader of the lines before it knows."""

    offset: int = 0  # bytes
    attempt: int = 0  # of the last valid line
    last_steps: Mapping[str, int] = field(default_factory=dict)  # of each kind of line that has steps

    def ends_line(self, path: Path) -> bool:
        """Return True if a line of `path` ends here; False if the log is another one, or cannot be read."""
        with suppress(OSError, ValueError), path.open("rb") as log:
            log.seek(self.offset - 1)
            return log.read(1) == b"\n"
        return False


class MetricsReader:
    """A reader of a log that may still grow: each call of `new` yields the lines appended since the last call.

    It skips torn lines, lines of an attempt below one already seen (a suspended owner may continue and write after a
    later attempt began), and lines but those of windows whose step is not above the last of their kind (a
    resumed run trained them again). Lines of format 1 become today's. It starts at `position`; a line torn by that is
    skipped too.
    """

    def __init__(self, path: Path, position: LogPosition = LogPosition()) -> None:
        self._tail = FileTail(path, position.offset)
        self._last_step = {"train": 0, "eval": 0, "epoch": 0, "predictions": 0, "hash": 0, **position.last_steps}
        self._attempt = position.attempt

    @property
    def position(self) -> LogPosition:
        """Return the start of the next call of `new`; valid once the last one is exhausted."""
        return LogPosition(self._tail.offset, self._attempt, dict(self._last_step))

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the valid lines that were not yielded before, in order."""
        for row in self._tail.read_lines():
            try:
                line = json.loads(row)
            except ValueError:
                continue  # torn by a kill, and followed by the lines of the next owner
            if line["attempt"] < self._attempt:
                continue
            self._attempt = line["attempt"]
            yield from filter(self._is_new, _lines_of(line))

    def _is_new(self, line: dict[str, Any]) -> bool:
        if (last := self._last_step.get(line["kind"])) is not None:
            if line["step"] <= last:
                return False
            self._last_step[line["kind"]] = line["step"]
        return True


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all valid lines, in order (see MetricsReader)."""
    return MetricsReader(path).new()


def tail(path: Path, enough: Callable[[list[dict[str, Any]]], bool], block: int = 1 << 18) -> list[dict[str, Any]]:
    """Return the valid lines in the last `block` bytes; double `block` until `enough(lines)` is true.

    Lines of an earlier attempt are skipped only after a line of a later one within these bytes.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return []
    while True:
        lines = list(MetricsReader(path, LogPosition(max(0, size - block))).new())
        if block >= size or enough(lines):
            return lines
        block *= 2


def mean_or_none(total: float, weight: float) -> float | None:
    """Return `total / weight`, or None if `weight` is 0 or `total` is not finite (JSON has no NaN)."""
    return total / weight if weight and math.isfinite(total) else None


def is_better(value: float | None, than: float | None, direction: str) -> bool:
    """Return True if `value` is better; any value is better than None."""
    if value is None or than is None:
        return value is not None and than is None
    return value > than if direction == "higher" else value < than


MAX_RANK_CURVES = 64  # ranks with a curve of their own; more of them make W&B's pages slow and the log large


def loss_extremes(per_rank: Sequence[float | None]) -> tuple[float | None, float | None, int | None]:
    """Return the lowest loss of all ranks, the highest, and the first rank that has it; None if no rank has a loss."""
    losses = [loss for loss in per_rank if loss is not None]
    if not losses:
        return None, None, None
    return min(losses), max(losses), per_rank.index(max(losses))
