"""Gradients that a replayed CUDA graph owns. Without a GPU: a backward pass that reuses memory, as a replay does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.process_group import Group

REPLAYED = torch.zeros(3)  # the gradient, at the same address in each replay


class Replay(torch.autograd.Function):
    """The weighted sum of a batch; backward overwrites the gradient that it has returned before."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(inputs)
        return (inputs * weight).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        [inputs] = context.saved_tensors
        return None, torch.mul(inputs, gradient, out=REPLAYED).detach()


class Compiled(nn.Module):
    """Stands where a compiled model with its loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.weight = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return Replay.apply(inputs, self.model.weight)


@pytest.mark.parametrize(
    ("numerics", "shards", "microbatches"), [("fast", 1, 1), ("fast", 1, 2), ("invariant", 2, 1), ("invariant", 2, 2)]
)
def test_a_replay_overwrites_no_gradient_of_another_microbatch_shard_or_step(
    numerics: str, shards: int, microbatches: int
) -> None:
    config = ParallelConfig(numerics=numerics, logical_shards=2, compile=True, grad_accum_steps=microbatches)
    sync = GradientSync(Compiled(), Group(0, 1, torch.device("cpu")), config)
    sync._has_cuda_graphs = True  # as on a GPU
    batch = torch.arange(3.0 * shards * microbatches).view(shards, microbatches, 3)
    for scale in (1.0, 10.0):  # two steps
        sync.zero_grad()
        for shard in batch:
            for microbatch in shard:
                sync.module(microbatch * scale).backward()
            if sync.is_invariant:
                sync.add_shard_gradients(torch.zeros(()), torch.ones(()))
        sync.all_reduce()
        [gradient] = sync.gradients()
        assert torch.equal(gradient, batch.sum(dim=(0, 1)) * scale)
