"""The metrics log, metrics.jsonl: one JSON object a line, each step once over all attempts.

The keys of a line are always present, and null if nothing was measured. Other programs read them: do not rename one.

Rank 0 appends to it. A resumed run may train steps again that the log already holds: readers skip the second line of a
step (`MetricsReader`), so nothing has to be rewritten.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

from fnet_dist.run.tail import FileTail


class TrainLine(TypedDict):
    """One optimizer step. `loss` is the mean over the global batch, `loss_per_rank[r]` over rank r's local batch.

    Above 64 ranks, to bound the size of the log, only every `tracking.log_every_steps`-th step has `loss_per_rank`. The
    other steps have `loss_min`, `loss_max` and `worst_rank` instead, which are null elsewhere.
    `samples` counts from the run's start; `grad_norm` is taken before clipping; `time` is Unix time in seconds.
    """

    kind: Literal["train"]
    step: int
    epoch: int
    samples: int
    loss: float
    loss_per_rank: list[float | None] | None
    loss_min: float | None
    loss_max: float | None
    worst_rank: int | None
    lr: float
    grad_norm: float | None
    time: float
    attempt: int


class WindowLine(TypedDict):
    """The steps between two collectives, about one second."""

    kind: Literal["window"]
    first_step: int
    last_step: int
    time: float
    samples_per_second: float
    step_ms: float
    slowest_rank: int | None
    max_over_median: float | None
    max_memory_gib: float
    world_size: int
    attempt: int


class EpochLine(TypedDict):
    """One epoch. `train_loss` is the mean of its steps' losses; `seconds` is training time, without evaluation."""

    kind: Literal["epoch"]
    epoch: int
    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    test_correct: int
    test_count: int
    seconds: float
    samples_per_second: float
    attempt: int


class HashLine(TypedDict):
    """SHA-256 of each parameter after a step, in hex, every `parallel.hash_every_steps`; equal on all ranks."""

    kind: Literal["hash"]
    step: int
    weights: dict[str, str]
    attempt: int


Line = TrainLine | WindowLine | EpochLine | HashLine


def append(path: Path, lines: Iterable[Line]) -> None:
    """Append all `lines` in one write, or none and raise OSError. A crash can tear the last line at most."""
    # All lines are encoded before the first byte is written: NaN in one of them raises ValueError and leaves no part.
    data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    # O_APPEND: the position is the end of the file at each write, also if an earlier owner wakes up and writes too.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
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


def truncate_torn_line(path: Path) -> None:
    """Remove a torn last line. For a new owner, before it appends: its first line would join the torn one."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        end, tail = file.seek(0, os.SEEK_END), b""
        while end > 0 and b"\n" not in tail:
            end = max(0, end - 65536)
            file.seek(end)
            tail = file.read(65536)
        file.truncate(end + tail.rfind(b"\n") + 1)


def last_steps(path: Path) -> dict[str, int]:
    """Return the last step of the train lines and of the epoch lines; 0 if there is none."""
    last = {"train": 0, "epoch": 0}
    for line in read(path):
        if line["kind"] in last:
            last[line["kind"]] = line["step"]
    return last


class MetricsReader:
    """A reader of a log that may still grow: each call of `new` yields the lines appended since the last call.

    It skips torn lines, lines of an attempt below one already seen (a suspended owner may wake up and write after a
    later attempt began), and train, epoch and hash lines whose step is not above the last of their kind (a resumed run
    trained them again). `at` is the offset to start from, in bytes; a line torn by it is skipped too.
    """

    def __init__(self, path: Path, at: int = 0) -> None:
        self._tail = FileTail(path, at)
        self._last_step = {"train": 0, "epoch": 0, "hash": 0}
        self._attempt = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the valid lines that were not yielded before, in order."""
        for row in self._tail.read_lines():
            if (line := self._parse(row)) is not None:
                yield line

    def _parse(self, row: bytes) -> dict[str, Any] | None:
        """Return the line in `row`, or None if it is to be skipped."""
        try:
            line: dict[str, Any] = json.loads(row)
        except ValueError:
            return None  # torn by a kill, and followed by the lines of the next owner
        if line["attempt"] < self._attempt:
            return None
        self._attempt = line["attempt"]
        kind = line["kind"]
        if kind in self._last_step:
            if line["step"] <= self._last_step[kind]:
                return None
            self._last_step[kind] = line["step"]
        return line


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
        lines = list(MetricsReader(path, max(0, size - block)).new())
        if block >= size or enough(lines):
            return lines
        block *= 2


def mean_or_none(total: float, weight: float) -> float | None:
    """Return `total / weight`, or None if `weight` is 0 or `total` is not finite (JSON has no NaN)."""
    if weight == 0 or not math.isfinite(total):
        return None
    return total / weight


MAX_RANK_CURVES = 64  # ranks with a curve of their own; more of them make W&B's pages slow and the log large


def loss_extremes(per_rank: Sequence[float | None]) -> tuple[float | None, float | None, int | None]:
    """Return the lowest loss of all ranks, the highest, and the first rank that has it; None if no rank has a loss."""
    losses = [loss for loss in per_rank if loss is not None]
    if not losses:
        return None, None, None
    return min(losses), max(losses), per_rank.index(max(losses))
