"""Many ranks find by reduction the losses, extremes and first bad step that few ranks find by gathering."""

import math
import random

import pytest
import torch
from torch import Tensor

from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.run.metrics_log import loss_extremes
from fnet_dist.training.step import StepMetrics
from fnet_dist.training.step_sums import local_columns, sums_of_few, sums_of_many
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.processes

RANKS, STEPS, EVERY = 4, 12, 5
BAD = (math.nan, math.inf, -math.inf)


def measured(rank: int, chance: random.Random, bad: bool) -> list[StepMetrics]:
    """Return a rank's steps from 1 on: some with an empty local batch, from half of them on perhaps a bad value."""
    steps = []
    for number in range(1, STEPS + 1):
        weight = chance.choice([0.0, 1.0, 16.0])
        values = [weight * chance.uniform(-1, 5) * 10 ** chance.randint(-6, 6), chance.random(), 2.5]
        if bad and number > STEPS // 2 and chance.random() < 0.1:
            values[chance.randrange(2)] = chance.choice(BAD)
        loss_sum, gradient, norm = (torch.tensor(value, dtype=torch.float64) for value in values)
        steps.append(StepMetrics(number, 16, loss_sum, weight, [gradient], grad_norm=norm if number % 3 == 0 else None))
    return steps


def compare(group: Group, seed: int) -> None:
    metrics = measured(group.rank, random.Random(f"{seed} {group.rank}"), bad=seed % 2 == 1)
    mine = local_columns(metrics, group.device)
    by_rank: Tensor = gather_rows(group, mine.flatten()).view(group.world_size, 4, STEPS)
    few, many = sums_of_few(metrics, by_rank), sums_of_many(group, metrics, mine, EVERY)
    assert few.failure == many.failure, seed
    assert many.losses == pytest.approx(few.losses, rel=1e-12, abs=1e-14)
    for index, losses in enumerate(few.per_rank):
        is_sent = (index + 1) % EVERY == 0
        assert many.per_rank[index] == (losses if is_sent else None)
        assert many.extremes[index] == ((None, None, None) if is_sent else loss_extremes(losses or ()))
    for each in metrics:  # with numerics invariant the tree has made the sums: no other bits are logged
        each.global_sums = torch.tensor([each.step / 3, 7.0], dtype=torch.float64)
    assert sums_of_many(group, metrics, mine, EVERY).losses == sums_of_few(metrics, by_rank).losses
    assert [norm for norm in many.grad_norms if norm] == [norm for norm in few.grad_norms if norm]


def compare_all(group: Group) -> None:
    for seed in range(60):
        compare(group, seed)


def test_many_ranks_find_by_reduction_what_few_ranks_find_by_gathering() -> None:
    run_ranks(compare_all, RANKS)


def test_sums_of_many_have_the_same_bits_in_any_order_of_ranks() -> None:
    """Else a loss in the log would depend on where its step stands in a window, which follows from timing."""
    from fnet_dist.training.step_sums import _from_fixed, _to_fixed

    chance = random.Random(0)
    numbers = [torch.tensor([[chance.uniform(-1, 1) * 10 ** chance.randint(-9, 9)]]).double() for _ in range(1000)]
    fixed = [_to_fixed(number) for number in numbers]
    sums = []
    for _ in range(5):
        chance.shuffle(fixed)
        sums.append(_from_fixed(sum(fixed[1:], fixed[0])).item())
    assert len({*sums}) == 1
    assert sums[0] == pytest.approx(math.fsum(number.item() for number in numbers), rel=1e-12)
