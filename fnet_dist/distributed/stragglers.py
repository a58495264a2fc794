"""Find the rank that slows the others down: time each rank's own computation, then compare the ranks.

The duration of a step does not tell: every rank waits for the slowest in the all-reduce, so all take equally long.
"""

import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- Measure: the compute time of this rank -------------------------------------------------------------------------

# Linux: this thread's time on a core, its time waiting for one (both ns) and its number of time slices.
SCHEDSTAT = "/proc/thread-self/schedstat"

Timestamp = float | torch.cuda.Event  # seconds on the CPU; an event in the device's stream on a GPU


class ComputeTimer:
    """The time that this rank computes in a step: data, forward and backward, without waiting for other ranks.

    It ends when the last of this rank's gradients is ready, before the all-reduce. The only wait before that is DDP's
    broadcast of buffers, in forward; `toggle_wait` excludes it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._toggles: list[Timestamp] = []  # computing from, until, from, ...; the end is `_ready`
        self._ready: Timestamp | None = None
        self._schedstat: int | None = None
        if not self._on_gpu:
            with suppress(OSError):  # not Linux: the wall clock alone, which is noisier
                self._schedstat = os.open(SCHEDSTAT, os.O_RDONLY)
                weakref.finalize(self, os.close, self._schedstat)

    def start(self) -> None:
        """Start to time a step. Without this call the other methods record nothing."""
        self._toggles = [self._now()]

    def toggle_wait(self) -> None:
        """Record that waiting begins or ends."""
        if self._toggles:
            self._toggles.append(self._now())

    def gradients_ready(self) -> None:
        """Record that some gradients are ready; the last call of a step counts."""
        if self._toggles:
            self._ready = self._now()

    def timestamps(self) -> tuple[Timestamp, ...]:
        """Return the step's (computing from, until) pairs as one flat tuple and reset; () if it was not timed."""
        found = () if self._ready is None else (*self._toggles, self._ready)
        self._toggles, self._ready = [], None
        return found

    def _now(self) -> Timestamp:
        if self._on_gpu:
            # The host only queues work: the device records the time when it gets there, without a synchronisation.
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._schedstat is None:
            return time.perf_counter()
        # Subtract the time in which this thread could run but other processes had its core. It is no fault of the rank,
        # and most of the noise where ranks share cores. Sleeping and waiting for data do count.
        return time.perf_counter() - int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9


def compute_ms(timestamps: Sequence[Any]) -> float:
    """Return the milliseconds within the pairs of ComputeTimer.timestamps; on a GPU only after a synchronisation."""
    pairs = zip(timestamps[::2], timestamps[1::2], strict=True)
    ms: float = sum(1000 * (to - start) if isinstance(start, float) else start.elapsed_time(to) for start, to in pairs)
    return ms


# ---- Detect: the straggler among all ranks ---------------------------------------------------------------------------

# The thresholds come from noise measured with tests/benchmarks/blame.py, ranks sharing two cores: healthy ranks differ
# by less than 5 % in most windows, by 20 % in one of fifty, and in short steps by some tenths of a millisecond.
RECENT_WINDOWS = 5  # that a decision looks at, about 2.5 s
SLOW_RATIO = 0.11  # a rank is slow if its mean excess over the recent windows is at least this part of the median
MAX_EXCESS = 0.15  # that one window counts for: three outliers of five are not enough, four slow windows are
STILL_SLOW = 0.08  # excess that the newest window must have too: a rank that has recovered is cleared at once
NOISE_MS = 0.5  # per step: a difference to ignore


class Straggler(NamedTuple):
    """The decision of `detect_straggler`; both fields are None with a single rank."""

    slowest_rank: int | None  # the rank found to be slow
    max_over_median: float | None  # highest compute time in the newest window over the median rank's


NO_STRAGGLER = Straggler(None, None)


def detect_straggler(recent: Sequence[Sequence[float] | Tensor]) -> Straggler:
    """Decide which rank is slow, from `recent` windows (oldest first) of each rank's compute time in a step, ms.

    Missing windows, at the start of a run, count as windows without an excess.
    """
    if not recent or len(recent[-1]) == 0:
        return NO_STRAGGLER
    windows = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in [*recent][-RECENT_WINDOWS:]])
    lower = (windows.shape[1] - 1) // 2  # the median, of two the lower; numpy finds it faster than torch does
    medians = torch.from_numpy(np.partition(windows.numpy(), lower)[:, lower, None]).clamp_min(1e-6)  # clocks can tie
    excess = ((windows - medians - NOISE_MS) / medians).clamp_min(0)
    is_slow = excess.clamp_max(MAX_EXCESS).sum(0) / RECENT_WINDOWS >= SLOW_RATIO
    newest = excess[-1].where(is_slow & (excess[-1] >= STILL_SLOW), -1.0)
    slowest = int(newest.argmax()) if newest.max() >= 0 else None
    return Straggler(slowest, float(windows[-1].max() / medians[-1]))
