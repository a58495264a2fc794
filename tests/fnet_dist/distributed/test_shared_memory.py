"""Gradients in shared memory: the exact mean, the same bits on every rank, and no wait for a rank that has ended."""

import os
import platform
import time
from pathlib import Path

import pytest
import torch

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed import gradient_sync, shared_memory
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.model_with_loss import ModelWithLoss
from fnet_dist.distributed.process_group import gather_rows
from fnet_dist.distributed.shared_memory import open_shared_memory
from fnet_dist.errors import ConfigError
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.processes


def average(shared, *tensors):
    """Return the mean over ranks, in shared memory."""
    shared.put(tensors, shared._world_size)
    return shared.take()


def check_many_means(group):
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


def test_three_ranks_get_the_exact_mean_in_every_one_of_300_steps():
    run_ranks(check_many_means, 3)


def check_one_ends(group):
    shared = open_shared_memory(group, [torch.empty(8)])
    average(shared, torch.ones(8))
    if group.rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="closed by peer: rank 1 has left"):
        average(shared, torch.ones(8))
    assert time.monotonic() - began < 5
    os._exit(0)  # the group cannot be closed in order


def test_a_rank_that_has_ended_is_named_and_no_rank_waits_for_it():
    run_ranks(check_one_ends, 2)


def gradients_of(group, numerics="fast"):
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 3).double()
    forward = ModelWithLoss(model, lambda outputs, targets: (outputs.square().sum(), targets.sum()))
    sync = GradientSync(forward, group, ParallelConfig(numerics=numerics))
    inputs = torch.randn(6, 50, generator=torch.Generator().manual_seed(group.rank)).double()
    for _ in range(3):
        sync.zero_grad()
        sync.module(inputs, torch.ones(6))[0].backward()
        sync.all_reduce()
        [mine, *none] = sync.local_gradient_sums()
        assert not none
        assert mine.isfinite()
    return torch.cat([gradient.flatten() for gradient in sync.gradients()])


def check_fallback_to_gloo(group):
    """Check that if one rank cannot open the memory, all use gloo, with the same mean."""
    shared = gradients_of(group)
    calls = []
    real = gradient_sync.allreduce_hook
    gradient_sync.allreduce_hook = lambda *arguments: calls.append(1) or real(*arguments)
    gradients_of(group)
    assert not calls
    if group.rank == 1:
        Path.readlink = lambda path: Path("/memfd:of another container")
    assert open_shared_memory(group, [torch.empty(8)]) is None
    if group.rank == 0:
        platform.machine = lambda: "aarch64"  # machines may differ: no rank may wait for it
    assert open_shared_memory(group, [torch.empty(8)]) is None
    gloo = gradients_of(group)
    assert len(calls) >= 3
    assert torch.allclose(shared, gloo, rtol=1e-14)
    assert torch.equal(*gather_rows(group, shared))


def test_if_a_rank_cannot_open_the_memory_all_ranks_use_gloo():
    run_ranks(check_fallback_to_gloo, 2)


def check_limits(group):
    shared_memory._MAX_BYTES = 2**20
    assert open_shared_memory(group, [torch.empty(100_000)]) is None
    assert open_shared_memory(group, [torch.empty(10_000)]) is not None
    assert open_shared_memory(group, [torch.empty(8), torch.empty(8, dtype=torch.float64)]) is None


def test_large_gradients_and_mixed_types_are_left_to_gloo():
    run_ranks(check_limits, 2)


def check_one_is_unused(group):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 2), "unused": torch.nn.Linear(4, 2)})
    model.forward = model["used"].forward
    sync = GradientSync(
        ModelWithLoss(model, lambda outputs, targets: (outputs.sum(), targets.sum())), group, ParallelConfig()
    )
    sync.module(torch.ones(3, 4), torch.ones(3))[0].backward()
    with pytest.raises(ConfigError, match=r"no gradient for unused.weight, unused.bias: .*unused-parameters"):
        sync.all_reduce()


def test_a_parameter_without_a_gradient_is_named():
    run_ranks(check_one_is_unused, 2)
