"""The ledger, metrics.jsonl: one complete JSON object a line; every step once, over all attempts.

Its lines are a contract; their keys are always present, and null where nothing was measured.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from fnet_dist.run.tail import FileTail


class TrainLine(TypedDict):
    """One optimizer step. `loss` is the mean over the global batch, `loss_per_rank[r]` over rank r's share of it.

    Of more than 64 ranks, only every `tracking.log_every_steps` has `loss_per_rank`: the other steps have in its place
    the lowest, the highest and the rank that has the highest, which elsewhere are null. So its volume stays bounded.
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
    """One epoch: `train_loss` is the mean of its steps' losses, `seconds` its training part."""

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
    """SHA-256 of each parameter after a step, in hex; every `parallel.hash_every_steps`, all ranks the same."""

    kind: Literal["hash"]
    step: int
    weights: dict[str, str]
    attempt: int


Line = TrainLine | WindowLine | EpochLine | HashLine


def append(path: Path, lines: Iterable[Line]) -> None:
    """Append `lines` in one write, so that a crash tears the last line at most; all of them, or none and OSError."""
    data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, data)
        if written < len(data):  # a full disk takes a part
            if os.fstat(descriptor).st_size == size + written:  # and nobody has taken over meanwhile
                os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until everything appended to `path` is on disk; a checkpoint must not outlive its steps' lines."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def truncate_torn_line(path: Path) -> None:
    """Cut a torn last line away: for a new owner, before it appends."""
    try:
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            tail = b""
            while end > 0 and b"\n" not in tail:
                end = max(0, end - 65536)
                file.seek(end)
                tail = file.read(65536)
            file.truncate(end + tail.rfind(b"\n") + 1)
    except FileNotFoundError:
        return


def last_steps(path: Path) -> dict[str, int]:
    """The last step recorded by a line of each kind; 0 where there is none yet."""
    last = {"train": 0, "epoch": 0}
    for line in read(path):
        if line["kind"] in last:
            last[line["kind"]] = line["step"]
    return last


class MetricsReader:
    """Reads a ledger that may still grow: each call of `new` gives the lines that have come since the last one.

    Torn lines and what replays or fenced-out owners wrote are left out. A train, epoch or hash line counts if its step
    is above the last of its kind and its attempt is not below one already seen: a stopped owner may wake up and write
    after its successor began. `at` is where to begin, in bytes; what is torn there is left out too.
    """

    def __init__(self, path: Path, at: int = 0) -> None:
        self._tail = FileTail(path, at)
        self._last_step = {"train": 0, "epoch": 0, "hash": 0}
        self._attempt = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The lines that count and have not been given yet, in order."""
        for row in self._tail.read_lines():
            if (line := self._counts(row)) is not None:
                yield line

    def _counts(self, row: bytes) -> dict[str, Any] | None:
        try:
            line: dict[str, Any] = json.loads(row)
        except ValueError:
            return None  # an owner was stopped in the middle of it, and another took over
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
    """All lines that count, in order; see Reader."""
    return MetricsReader(path).new()


def tail(path: Path, enough: Callable[[list[dict[str, Any]]], bool], block: int = 1 << 18) -> list[dict[str, Any]]:
    """The last lines that count: of the last `block` bytes, or of twice as many until `enough(lines)`, or all.

    What an overtaken owner wrote is left out only if its successor wrote before it, within what is read.
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
    """`total / weight`, or None where there was nothing to average or the figure is no number."""
    if weight == 0 or not math.isfinite(total):
        return None
    return total / weight


MAX_RANK_CURVES = 64  # with a curve of their own; above, W&B's pages and the rows themselves grow too long


def loss_extremes(per_rank: Sequence[float | None]) -> tuple[float | None, float | None, int | None]:
    """The lowest loss of all ranks, the highest, and the first rank that has it; nothing if no rank had a sample."""
    there = [(loss, -rank) for rank, loss in enumerate(per_rank) if loss is not None]
    if not there:
        return None, None, None
    most, rank = max(there)
    return min(there)[0], most, -rank
