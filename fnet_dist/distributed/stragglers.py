"""How long a rank works on its own part of a step, before it waits for the others: that tells a slow one apart."""

import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# This thread's time on a core, its time waiting for one (both ns) and its turns, where the system tells.
SCHEDSTAT = "/proc/thread-self/schedstat"

Timestamp = float | torch.cuda.Event  # in seconds, or a place in the device's queue of work


class ComputeTimer:
    """When this rank was busy with its own part of a step, and not waiting for the others.

    After the exchange all ranks' times are alike. So a step's own time ends where the last of its own gradients are
    ready: DDP calls its hook then, and neither waits there. Only where buffers are broadcast does forward wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._turns: list[Timestamp] = []
        self._ready: Timestamp | None = None
        self._schedstat: int | None = None
        if not self._on_gpu:
            try:
                self._schedstat = os.open(SCHEDSTAT, os.O_RDONLY)
                weakref.finalize(self, os.close, self._schedstat)
            except OSError:
                return  # not Linux, or not all of it: the plain clock, which is noisier

    def start(self) -> None:
        """A step begins that is to be timed: data, forward, backward."""
        self._turns = [self._now()]

    def turn(self, module: nn.Module, inputs: object) -> None:
        """Waiting begins, or ends: a hook before forward."""
        if self._turns:
            self._turns.append(self._now())

    def ready(self) -> None:
        """Some gradients are ready; what counts is the last call."""
        if self._turns:
            self._ready = self._now()

    def timestamps(self) -> tuple[Timestamp, ...]:
        """Of the step that was started, in pairs: busy from, busy until (see own_ms); none of a step that was not."""
        moments = () if self._ready is None else (*self._turns, self._ready)
        self._turns, self._ready = [], None
        return moments

    def _now(self) -> Timestamp:
        """On a GPU the host only queues work, so the device notes the time when it gets there; nobody waits for it.

        On the CPU the clock stands still while this thread could run but others have its core: no fault of the rank's,
        and by far the most of the noise where ranks share cores. Sleeping and waiting for data do count.
        """
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._schedstat is None:
            return time.perf_counter()
        return time.perf_counter() - int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9


def compute_ms(moments: Sequence[Timestamp]) -> float:
    """Milliseconds between the pairs of OwnTime.moments, added up; on a GPU once the device is through with them."""
    return sum(map(_ms_between, moments[::2], moments[1::2]))


def _ms_between(first: Any, second: Any) -> float:
    """Both are times, or both are events."""
    ms: float = 1000 * (second - first) if isinstance(first, float) else first.elapsed_time(second)
    return ms
