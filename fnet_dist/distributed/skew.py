"""Which rank slows the others down: a judgement over the ranks' own times, window after window. No torch here.

The figures come from noise measured with tests/benchmarks/blame.py: where ranks share two cores with others, healthy
ones differ by less than 5 % in most windows, by 20 % in one of fifty, in short steps by some tenths of a millisecond.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RECENT_WINDOWS = 5  # that a judgement looks at, some 2.5 s
SLOW_RATIO = 0.11  # of the median: who takes so much longer in the mean over them is slow
MOST = 0.15  # that one window counts for: three hiccups are no habit, and four windows suffice for the really slow
STILL_SLOW = 0.08  # in the newest window; who is below is well again, at once
NOISE_MS = 0.5  # a step: a difference that says nothing


@dataclass(frozen=True)
class Straggler:
    """`max_over_median` is the slowest rank's own time in the last window over the median rank's; `slowest_rank` is the
    rank to blame, if there is one. Both are None in a world of one."""

    slowest_rank: int | None
    max_over_median: float | None


NO_STRAGGLER = Straggler(None, None)


def detect_straggler(recent: Sequence[Sequence[float]]) -> Straggler:
    """What the `recent` windows say, the newest last; of each, every rank's own time in a step in ms.

    Fewer windows than WINDOWS are filled up with windows in which all was well.
    """
    if not recent or not recent[-1]:
        return NO_STRAGGLER
    windows = [_excesses(window) for window in [*recent][-RECENT_WINDOWS:]]
    newest = windows[-1]
    means = [sum(min(excess, MOST) for excess in of_rank) / RECENT_WINDOWS for of_rank in zip(*windows, strict=True)]
    slow = [rank for rank, mean in enumerate(means) if mean >= SLOW_RATIO and newest[rank] >= STILL_SLOW]
    named = max(slow, key=lambda rank: newest[rank], default=None)
    return Straggler(named, max(recent[-1]) / _median(recent[-1]))


def _excesses(window: Sequence[float]) -> list[float]:
    """How much longer than the median rank each took, as a part of the median; what may be noise is taken off."""
    median = _median(window)
    return [max(0.0, own - median - NOISE_MS) / median for own in window]


def _median(window: Sequence[float]) -> float:
    """Of an even number the lower one: of two ranks the faster. Never 0: own times are differences of clocks."""
    return max(statistics.median_low(window), 1e-6)
