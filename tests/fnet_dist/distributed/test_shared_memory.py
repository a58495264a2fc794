"""Gradients that meet in shared memory: the exact mean, the same bits on every rank, and no wait for one that left."""

import os
import platform
import time
from pathlib import Path

import pytest
import torch

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed import gradient_sync as exchange
from fnet_dist.distributed import shared_memory
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.model_with_loss import ModelWithLoss
from fnet_dist.distributed.process_group import gather_rows
from fnet_dist.distributed.shared_memory import open_shared_memory
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.processes


def average(shared, *tensors):
    """One exchange."""
    shared.put(tensors, shared._world_size)
    return shared.take()


def many_exchanges(group):
    shapes = [(1001,), (7, 3)]
    shared = open_shared_memory(group, [torch.empty(shape) for shape in shapes])
    for number in range(300):
        generators = [torch.Generator().manual_seed(1000 * number + rank) for rank in range(group.world_size)]
        draws = [[torch.randn(shape, generator=each) for shape in shapes] for each in generators]
        for mine, parts in zip(average(shared, *draws[group.rank]), zip(*draws, strict=True), strict=True):
            expected = parts[0] / group.world_size
            for part in parts[1:]:
                expected += part / group.world_size  # in the ranks' order
            assert torch.equal(mine, expected)


def test_three_ranks_get_the_mean_to_the_bit_again_and_again():
    run_ranks(many_exchanges, 3)


def one_leaves(group):
    shared = open_shared_memory(group, [torch.empty(8)])
    average(shared, torch.ones(8))
    if group.rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="closed by peer: rank 1 has left"):
        average(shared, torch.ones(8))
    assert time.monotonic() - began < 5
    os._exit(0)  # the group cannot be taken down in order


def test_a_rank_that_left_is_named_and_nobody_waits_for_it():
    run_ranks(one_leaves, 2)


def gradients_of(group, numerics="fast"):
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 3).double()
    forward = ModelWithLoss(model, lambda outputs, targets: (outputs.square().sum(), targets.sum()))
    joined = GradientSync(forward, group, ParallelConfig(numerics=numerics))
    inputs = torch.randn(6, 50, generator=torch.Generator().manual_seed(group.rank)).double()
    for _ in range(3):
        joined.zero_grad()
        joined.module(inputs, torch.ones(6))[0].backward()
        joined.all_reduce()
        [mine, *none] = joined.local_gradient_sums()
        assert not none
        assert mine.isfinite()
    return torch.cat([gradient.flatten() for gradient in joined.gradients()])


def not_everywhere(group):
    """Where one rank cannot see the memory, all use gloo: the same mean."""
    there = gradients_of(group)
    seen = []
    real = exchange.allreduce_hook
    exchange.allreduce_hook = lambda *arguments: seen.append(1) or real(*arguments)
    gradients_of(group)
    assert not seen
    if group.rank == 1:
        Path.readlink = lambda path: Path("/memfd:of another container")
    assert open_shared_memory(group, [torch.empty(8)]) is None
    if group.rank == 0:
        platform.machine = lambda: "aarch64"  # another machine may be of another kind: nobody waits for it
    assert open_shared_memory(group, [torch.empty(8)]) is None
    gloo = gradients_of(group)
    assert len(seen) >= 3
    assert torch.allclose(there, gloo, rtol=1e-14)
    assert torch.equal(*gather_rows(group, there))


def test_ranks_that_do_not_all_see_the_memory_use_gloo():
    run_ranks(not_everywhere, 2)


def too_large(group):
    shared_memory._MOST = 2**20
    assert open_shared_memory(group, [torch.empty(100_000)]) is None
    assert open_shared_memory(group, [torch.empty(10_000)]) is not None
    assert open_shared_memory(group, [torch.empty(8), torch.empty(8, dtype=torch.float64)]) is None


def test_large_gradients_and_mixed_types_are_gloos():
    run_ranks(too_large, 2)


def one_is_left_out(group):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 2), "unused": torch.nn.Linear(4, 2)})
    model.forward = model["used"].forward
    joined = GradientSync(
        ModelWithLoss(model, lambda outputs, targets: (outputs.sum(), targets.sum())), group, ParallelConfig()
    )
    joined.module(torch.ones(3, 4), torch.ones(3))[0].backward()
    with pytest.raises(RuntimeError, match=r"no gradient for model.unused.weight, model.unused.bias: "):
        joined.all_reduce()


def test_a_parameter_without_a_gradient_is_named():
    run_ranks(one_is_left_out, 2)
