"""Make the lines of a window for the metrics log."""

import math
import time
from typing import cast

from torch import Tensor

from fnet_dist.distributed.stragglers import NO_STRAGGLER, Straggler
from fnet_dist.run.metrics_log import Line, Spread, WindowLine
from fnet_dist.training.window import OF_EACH_RANK, Window

MAX_RANKS = 8  # with figures of their own; of more ranks, how far apart they are


def window_lines(window: Window, attempt: int, straggler: Straggler = NO_STRAGGLER) -> list[Line]:
    """Return the window's lines for the metrics log: one for each step, its hashes if it has any, then its own."""
    lines: list[Line] = []
    for record in window.steps:
        lines.append(
            {
                "kind": "train",
                "step": record.step,
                "epoch": window.epoch,
                "samples": record.samples,
                "loss": record.loss,
                "loss_per_rank": None if record.loss_per_rank is None else list(record.loss_per_rank),
                "loss_min": record.loss_min,
                "loss_max": record.loss_max,
                "worst_rank": record.worst_rank,
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "time": record.time,
                "attempt": attempt,
            }
        )
    if window.hashes is not None:
        lines.append({"kind": "hash", "step": window.steps[-1].step, "weights": window.hashes, "attempt": attempt})
    line = {
        "kind": "window",
        "first_step": window.steps[0].step,
        "last_step": window.steps[-1].step,
        "time": time.time(),
        "samples_per_second": window.samples_per_second,
        "step_ms": 1000 * window.seconds / len(window.steps),
        "slowest_rank": straggler.slowest_rank,
        "max_over_median": straggler.max_over_median,
        "max_memory_gib": window.max_memory_gib,
        "world_size": window.world_size,
        **{name: spread(window.by_rank[name]) for name in OF_EACH_RANK},
        "attempt": attempt,
    }
    lines.append(cast("WindowLine", line))
    return lines


def spread(values: Tensor) -> Spread | None:
    """Return how far apart the ranks' `values` (ranks,) are; NaN where a rank has none, None if no rank has one."""
    ordered = values[~values.isnan()].sort().values.tolist()
    if not ordered:
        return None
    each = [None if math.isnan(value) else value for value in values.tolist()] if len(values) <= MAX_RANKS else None
    return {
        "min": ordered[0],
        "median": ordered[(len(ordered) - 1) // 2],
        "max": ordered[-1],
        "max_rank": int(values.nan_to_num(nan=-math.inf).argmax()),
        "by_rank": each,
    }
