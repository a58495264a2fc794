"""Windows of thousands of ranks in one process: rank 0's own code, with collectives that make up the other ranks."""

import time
from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from fnet_dist.distributed.process_group import Group
from fnet_dist.training import step_sums, window
from fnet_dist.training.step import StepMetrics
from fnet_dist.training.step_sums import _to_fixed
from fnet_dist.training.window import OF_EACH_RANK, Window, WindowStart, close_window

WORST = 77  # the rank with the highest loss
HEADER = 7 + len(OF_EACH_RANK)  # numbers that a rank sends about itself, see close_window


def raised(group: Group) -> Tensor:
    """Return how much higher each rank's loss is than rank 0's."""
    losses = torch.arange(group.world_size, dtype=torch.float64) / 1000
    losses[WORST] = 99.0
    return losses


def gathered(group: Group, row: Tensor) -> Tensor:
    """Return all ranks' rows, of which `row` is rank 0's: its header, or losses, which are higher on the others."""
    rows = row.repeat(group.world_size, 1)
    return rows if len(row) == HEADER else rows + raised(group)[:, None]


def reduced(group: Group, mine: Tensor, operation: str) -> Tensor:
    """Return the sum, maximum or minimum of all ranks' tensors, of which `mine` is rank 0's."""
    if operation == "sum":  # fixed-point numbers of loss sums and weights
        loss_sums, weights = group.world_size * (mine[0].double() + mine[1].double() / 2**48)
        return _to_fixed(torch.stack([loss_sums + weights * raised(group).mean(), weights]))
    if operation == "max":  # highest losses, negated lowest ones, gradient norms
        return mine + torch.tensor([raised(group).max(), 0, 0])[:, None]
    return torch.cat([torch.full((len(mine) - 1,), WORST), mine[-1:]])  # the worst rank of each step


def steps_of(first: int, count: int, batch: int) -> list[StepMetrics]:
    """Return a rank's measurements of `count` steps from step `first` on."""
    times = ((1, 0.0), (2, 0.005), (2, 0.006))
    return [
        StepMetrics(number, batch, torch.tensor(4.0), 4.0, [torch.tensor(1.0)] * 6, times=times)
        for number in range(first, first + count)
    ]


def close_window_of_many(ranks: int, metrics: Sequence[StepMetrics], log_every_steps: int) -> Window:
    """Return the window of these steps as rank 0 of `ranks` closes it."""
    group, samples = Group(0, ranks, torch.device("cpu")), metrics[0].samples * (metrics[0].step - 1)
    with (
        patch.object(window, "gather_rows", gathered),
        patch.object(step_sums, "gather_rows", gathered),
        patch.object(step_sums, "all_reduce", reduced),
    ):
        began = time.perf_counter() - 0.5
        return close_window(group, WindowStart(1, samples, began), metrics, log_every_steps=log_every_steps)
