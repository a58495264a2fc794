"""One optimizer step: the pieces of a global batch through the model, gradients exchanged, weights moved."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from fnet_dist.data.sampler import Microbatch, StepBatch
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.stragglers import Timestamp
from fnet_dist.loss import Loss
from fnet_dist.seeding import seed_device, step_seed

Inputs = tuple[Tensor, Tensor]


class Backward(NamedTuple):
    """What a pass over this rank's pieces gave, as tensors on the device."""

    loss_sum: Tensor
    weight: Tensor | float
    global_sums: Tensor | None
    gradient_sums: list[Tensor]
    compute_time: tuple[Timestamp, ...]


class StepResult(NamedTuple):
    """A step as its window records it. `loss_sum`, `weight`, `gradient_sums` (see Exchange.local_sums) and `own_time`
    (see OwnTime.moments; only of timed steps) are this rank's; `samples` are the global batch's, and so are
    `global_sums`, (2,): loss and weight, where logical shards were added up."""

    loss_sum: Tensor
    weight: Tensor | float
    gradient_sums: list[Tensor]
    grad_norm: Tensor | None
    lr: float
    samples: int
    compute_time: tuple[Timestamp, ...] = ()
    global_sums: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """Everything a step needs, built once."""

    exchange: GradientSync
    loss: Loss
    optimizer: optim.Optimizer
    update: Callable[[], None]  # moves the weights, as optimizer.step() does
    group: Group
    lr_of: Callable[[int], float]
    seed: int  # of the random streams of all steps
    microbatches: int = 1  # of each rank's share, or logical shard
    max_grad_norm: float | None = None
    grad_norm_every_steps: int = 50  # without clipping; with it at each step

    def take(self, number: int, batch: StepBatch, data: Iterator[Inputs], timed: bool = False) -> StepResult:
        """Optimizer step `number` (from 1) over `batch`, whose inputs and targets come next from `data`."""
        if timed:
            self.exchange.start_compute_timer()
        lr = self.lr_of(number)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        if isinstance(self.optimizer, optim.LBFGS):
            backward = self._lbfgs(self.optimizer, number, batch, data)
            return _result(backward, None, lr, batch)
        self.exchange.zero_grad()
        backward = self.backward(number, batch, data)
        grad_norm = None
        if self.max_grad_norm is not None:
            grad_norm = nn.utils.get_total_norm(self.exchange.gradients())
            nn.utils.clip_grads_with_norm_(self.exchange.parameters, self.max_grad_norm, grad_norm)
        elif number % self.grad_norm_every_steps == 0:
            grad_norm = nn.utils.get_total_norm(self.exchange.gradients())
        self.update()
        return _result(backward, grad_norm, lr, batch)

    def backward(self, number: int, batch: StepBatch, data: Iterable[Inputs]) -> Backward:
        """Leave the exact mean's gradient over the global batch in every parameter.

        Where the loss's weight is the sample count, each piece is scaled before backward: DDP's average over ranks, or
        the sum over logical shards, is then the mean. Otherwise sums go backward, their weights are added up beside
        it, and the gradients are scaled afterwards (the sum of a weighted mean is not known before every rank has seen
        its targets).
        """
        count = getattr(self.loss, "weight_is_count", False)
        invariant = self.exchange.is_invariant
        averaged_over = 1 if invariant else self.group.world_size
        scale = averaged_over / batch.global_samples if count else 1.0
        totals, weights = [], []
        reduction: dist.Work | None = None
        for index, (microbatch, (inputs, targets)) in enumerate(zip(batch.microbatches, data, strict=False)):
            last = index == len(batch.microbatches) - 1
            stream = self.group.rank * len(batch.microbatches) + index
            seed_device(self.group.device, step_seed(self.seed, number, stream))
            with nullcontext() if last else self.exchange.no_sync():
                total, weight = self._forward(microbatch, inputs, targets)
                totals.append(self.exchange.detach_result(total))
                if invariant or not count:
                    weights.append(self.exchange.detach_result(weight))
                if last and not count and not invariant:
                    global_weight = torch.stack(weights).sum()
                    if self.group.world_size > 1:
                        reduction = dist.all_reduce(global_weight, async_op=True)
                total.backward(total.new_full((), scale))  # as if the sum were scaled, in fewer operations
            if invariant and (index + 1) % self.microbatches == 0:
                shard = slice(index + 1 - self.microbatches, index + 1)
                self.exchange.add_shard_gradients(
                    torch.stack([_sum(totals[shard]), _sum(weights[shard]).to(total.dtype)])
                )
        global_sums = self.exchange.all_reduce()
        gradient_sums, compute_time = self.exchange.local_gradient_sums(), self.exchange.compute_time()
        if not count:
            if global_sums is not None:
                global_weight = global_sums[1]
            elif reduction is not None:
                reduction.wait()
            torch._foreach_mul_(self.exchange.gradients(), averaged_over / global_weight)
        local_weight = float(sum(microbatch.samples for microbatch in batch.microbatches)) if count else _sum(weights)
        return Backward(_sum(totals), local_weight, global_sums, gradient_sums, compute_time)

    def _forward(self, microbatch: Microbatch, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        total, weight = self.exchange.module(inputs, targets)
        return (total, weight) if microbatch.samples else (total * 0, weight * 0)

    def _lbfgs(self, optimizer: optim.LBFGS, number: int, batch: StepBatch, data: Iterator[Inputs]) -> Backward:
        """LBFGS evaluates the batch several times and branches on the loss, so that must be the global one.

        What is recorded is the first evaluation, before the weights move.
        """
        inputs = [next(data) for _ in batch.microbatches]
        evaluations: list[Backward] = []

        def closure() -> float:
            self.exchange.zero_grad()
            evaluations.append(backward := self.backward(number, batch, inputs))
            pair = backward.global_sums
            if pair is None:
                pair = torch.stack([backward.loss_sum, torch.as_tensor(backward.weight, device=self.group.device)])
                if self.group.world_size > 1:
                    dist.all_reduce(pair)
            total, weight = pair.tolist()
            return float(total / weight)

        optimizer.step(closure)
        return evaluations[0]


def _result(backward: Backward, grad_norm: Tensor | None, lr: float, batch: StepBatch) -> StepResult:
    return StepResult(
        backward.loss_sum,
        backward.weight,
        backward.gradient_sums,
        grad_norm,
        lr,
        batch.global_samples,
        backward.compute_time,
        backward.global_sums,
    )


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
