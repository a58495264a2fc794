"""Find the rank that slows the others down, by the time that each rank is busy in a step (step_times.py)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    max_over_median: float | None  # highest busy time in the newest window over the median rank's


NO_STRAGGLER = Straggler(None, None)


def detect_straggler(recent: Sequence[Sequence[float] | Tensor]) -> Straggler:
    """Decide which rank is slow, from `recent` windows (oldest first) of each rank's busy time in a step, ms.

    Missing windows, at the start of a run, count as windows without an excess.
    """
    if not recent or len(recent[-1]) < 2:
        return NO_STRAGGLER
    windows = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in [*recent][-RECENT_WINDOWS:]])
    lower = (windows.shape[1] - 1) // 2  # the median, of two the lower; numpy finds it faster than torch does
    medians = torch.from_numpy(np.partition(windows.numpy(), lower)[:, lower, None]).clamp_min(1e-6)  # clocks can tie
    excess = ((windows - medians - NOISE_MS) / medians).clamp_min(0)
    is_slow = excess.clamp_max(MAX_EXCESS).sum(0) / RECENT_WINDOWS >= SLOW_RATIO
    newest = excess[-1].where(is_slow & (excess[-1] >= STILL_SLOW), -1.0)
    slowest = int(newest.argmax()) if newest.max() >= 0 else None
    return Straggler(slowest, float(windows[-1].max() / medians[-1]))


LASTING_S = 600.0  # of training: after it, a straggler is no passing disturbance


class StragglerStreak:
    """The windows in a row that name the same rank."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._first_step = 0
        self._seconds = 0.0
        self._is_known = False

    def add(self, rank: int | None, first_step: int, seconds: float) -> int | None:
        """Add a window of `seconds`, from `first_step` on, that names `rank`.

        Return the first step of the windows in a row that name it, once, when they have lasted LASTING_S; else None.
        """
        if rank is None or rank != self._rank:
            self._rank, self._first_step, self._seconds, self._is_known = rank, first_step, 0.0, False
        self._seconds += seconds  # not the clock's: an evaluation between two windows proves nothing
        if rank is None or self._is_known or self._seconds < LASTING_S:
            return None
        self._is_known = True
        return self._first_step
