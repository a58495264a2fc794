"""Measure where a step's time goes on one rank: waiting for data, computing, waiting for other ranks.

The duration of a step does not tell which rank is slow: every rank waits for the slowest in the all-reduce, so all take
equally long.
"""

import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch

# Linux: this thread's time on a core, its time waiting for one (both ns) and its number of time slices.
SCHEDSTAT = "/proc/thread-self/schedstat"

Timestamp = float | torch.cuda.Event  # seconds on the CPU; an event in the device's stream on a GPU
_DATA, _COMPUTE, _EXCHANGE = range(3)
Mark = tuple[int, Timestamp]  # which of the three begins, and when; the last mark is the end


class StepTimes(NamedTuple):
    """The parts of a step on one rank, in milliseconds, before the optimizer's update."""

    data: float  # until the batch is there
    compute: float  # forward and backward
    exchange: float  # after this rank's last gradient, until those of all ranks are there


class StepTimer:
    """Times a step by marks at its changes. Without a call of `start` the other methods record nothing.

    Compute time ends when the last of this rank's gradients is ready. Before that, a rank waits for others only in
    DDP's broadcast of buffers, in forward. What DDP sends while backward still computes is not counted as waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Mark] = []
        self._ready: Timestamp | None = None
        self._schedstat: int | None = None
        if not self._on_gpu:
            with suppress(OSError):  # not Linux: the wall clock alone, which is noisier
                self._schedstat = os.open(SCHEDSTAT, os.O_RDONLY)
                weakref.finalize(self, os.close, self._schedstat)

    def start(self) -> None:
        """Start to time a step."""
        self._marks, self._ready = [(_COMPUTE, self._now())], None

    def read(self) -> None:
        """Record that the rank waits for data from now on."""
        if self._marks:
            self._marks.append((_DATA, self._now()))

    def compute(self) -> None:
        """Record that it computes from now on."""
        if self._marks:
            self._marks.append((_COMPUTE, self._now()))

    def exchange(self) -> None:
        """Record that it waits for other ranks from now on."""
        if self._marks:
            self._marks.append((_EXCHANGE, self._now()))

    def gradients_ready(self) -> None:
        """Record that some gradients are ready; the last call of a step counts."""
        if self._marks:
            self._ready = self._now()

    def end(self) -> tuple[Mark, ...]:
        """Record that the gradients of all ranks are there; return the step's marks, () if it was not timed."""
        if not (marks := self._marks):
            return ()
        end = self._now()
        ready = end if self._ready is None else self._ready  # a single rank's are ready then
        self._marks = []
        return (*marks, (_EXCHANGE, ready), (_EXCHANGE, end))

    def _now(self) -> Timestamp:
        if self._on_gpu:
            # The host only queues work: the device records the time when it gets there, without a synchronisation.
            # While the host waits for data, the device has nothing to do either, or works off what is queued.
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._schedstat is None:
            return time.perf_counter()
        # Subtract the time in which this thread could run but other processes had its core. It is no fault of the rank,
        # and most of the noise where ranks share cores. Sleeping and waiting for data do count.
        return time.perf_counter() - int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9


def step_times(marks: Sequence[Any]) -> StepTimes:
    """Return the times between the marks of StepTimer.end; on a GPU only after a synchronisation."""
    times = [0.0, 0.0, 0.0]
    for (kind, began), (_, ended) in pairwise(marks):
        times[kind] += 1000 * (ended - began) if isinstance(began, float) else began.elapsed_time(ended)
    return StepTimes(*times)
