"""python -m tests.benchmarks.loop: what the loop itself costs a step, without the model; bounds of its promises.

On one rank: slicing the epoch's order, closing the window, making and appending its lines. At many ranks: the same
without the slices, with collectives that make up the other ranks (tests/helpers/simulated_ranks.py).
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.stragglers import detect_straggler
from fnet_dist.run import metrics_log
from fnet_dist.training.window import WindowStart, close_window
from fnet_dist.training.window_lines import window_lines
from tests.helpers.simulated_ranks import close_window_of_many, steps_of

STEPS, ROUNDS, EVERY = 500, 15, 50
BOUNDS_US = {1: 8.0, 512: 10.0, 16_384: 20.0}  # ranks -> microseconds a step


def slices() -> float:
    """Return the seconds to slice an epoch of STEPS global batches."""
    sampler = GlobalBatchSampler(range(64 * STEPS), global_batch_size=64)
    began = time.perf_counter()
    order_s = time.perf_counter()
    sampler.permutation()  # once an epoch, and of its samples: not counted
    order_s = time.perf_counter() - order_s
    assert sum(1 for _ in sampler.steps()) == STEPS
    return time.perf_counter() - began - 2 * order_s


def bookkeeping(ranks: int, first: int, log: Path) -> float:
    """Return rank 0's seconds for one window of STEPS steps from `first` on: until its lines are in `log`."""
    metrics = steps_of(first, STEPS, 64)
    began = time.perf_counter()
    if ranks == 1:
        closed = close_window(Group(0, 1, torch.device("cpu")), WindowStart(1, 0, began - 0.5), metrics)
    else:
        closed = close_window_of_many(ranks, metrics, EVERY)
    metrics_log.append(log, window_lines(closed, 1, detect_straggler([closed.by_rank["busy_ms"]] * 5)))
    return time.perf_counter() - began


def main() -> int:
    torch.set_num_threads(1)
    held = True
    with tempfile.TemporaryDirectory() as folder:
        for ranks, bound in BOUNDS_US.items():
            rounds = []
            for number in range(ROUNDS):
                seconds = bookkeeping(ranks, 1 + number * STEPS, Path(folder, str(ranks)))
                rounds.append((seconds + (slices() if ranks == 1 else 0)) / STEPS * 1e6)
            median = statistics.median(rounds)
            held &= median < bound
            print(f"{ranks:>6,} ranks: {median:.1f} us a step, least {min(rounds):.1f}; promised: under {bound:g}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
