"""One optimizer step: forward and backward over this rank's microbatches, gradient synchronisation, weight update."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from fnet_dist.data.datasets import Batch
from fnet_dist.data.sampler import StepBatch
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.step_times import Mark
from fnet_dist.errors import NonFiniteError
from fnet_dist.loss import Loss
from fnet_dist.seeding import seed_device, step_seed


@dataclass(slots=True)
class StepMetrics:
    """One rank's measurements of one optimizer step. Tensors stay on the device: close_window reads them."""

    step: int  # from 1
    samples: int  # in the global batch
    loss_sum: Tensor  # 0-dim, over this rank's local batch
    weight: Tensor | float  # over this rank's local batch; a mean loss is a loss sum / a weight
    gradient_sums: list[Tensor]  # 0-dim, of this rank's own gradients, see GradientSync.local_gradient_sums
    global_sums: Tensor | None = None  # (2,) loss sum and weight of the global batch; only with numerics invariant
    times: tuple[Mark, ...] = ()  # see StepTimer.end; empty if the step was not timed
    grad_norm: Tensor | None = None  # 0-dim, of the global gradient before clipping; None if not measured
    lr: float = 0.0
    time: float = 0.0  # Unix time, seconds, at the end of the step


@dataclass(frozen=True)
class Step:
    """Everything an optimizer step needs, built once."""

    gradient_sync: GradientSync
    loss: Loss
    optimizer: optim.Optimizer
    update: Callable[[], None]  # does what optimizer.step() does
    group: Group
    lr_of: Callable[[int], float]  # step -> learning rate
    seed: int  # of the random streams of all steps
    microbatches: int = 1  # in each rank's local batch; with numerics invariant, in each logical shard
    max_grad_norm: float | None = None
    grad_norm_every_steps: int = 50  # with clipping, the norm is measured in every step

    def take(self, number: int, batch: StepBatch, data: Iterator[Batch], timed: bool = False) -> StepMetrics:
        """Run optimizer step `number` (from 1) over `batch`, whose inputs and targets come next from `data`."""
        if timed:
            self.gradient_sync.timer.start()
        lr = self.lr_of(number)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr * parameter_group.get("lr_scale", 1.0)
        if isinstance(self.optimizer, optim.LBFGS):
            metrics = self._lbfgs(self.optimizer, number, batch, data)
        else:
            self.gradient_sync.zero_grad()
            metrics = self.backward(number, batch, data)
            if self.max_grad_norm is not None or number % self.grad_norm_every_steps == 0:
                metrics.grad_norm = grad_norm = nn.utils.get_total_norm(self.gradient_sync.gradients())
                if self.max_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(self.gradient_sync.parameters, self.max_grad_norm, grad_norm)
            self.update()
        metrics.lr, metrics.time = lr, time.time()
        return metrics

    def backward(self, number: int, batch: StepBatch, data: Iterable[Batch]) -> StepMetrics:
        """Leave the gradient of the global batch's mean loss in every parameter, on every rank.

        The mean loss is a sum over the global batch divided by a weight over the global batch. If the weight is the
        number of samples (`weight_is_count`), every rank knows it beforehand: each microbatch's backward pass is
        scaled, so that DDP's average over ranks, or the sum over logical shards, is the mean. Otherwise (class
        weights) the global weight depends on all ranks' targets: backward passes run unscaled while the weights are
        all-reduced, and the gradients are divided afterwards.
        """
        sync = self.gradient_sync
        weight_is_count = getattr(self.loss, "weight_is_count", False)
        averaged_over = 1 if sync.is_invariant else self.group.world_size
        scale = averaged_over / batch.global_samples if weight_is_count else 1.0
        loss_sums, weights = [], []
        weight_reduction: dist.Work | None = None
        for index, (microbatch, (inputs, targets)) in enumerate(zip(batch.microbatches, data, strict=False)):
            is_last = index == len(batch.microbatches) - 1
            # Dropout draws from a stream of its own for each microbatch (with numerics invariant: whatever the rank).
            stream = self.group.rank * len(batch.microbatches) + index
            seed_device(self.group.device, step_seed(self.seed, number, stream))
            # DDP starts its all-reduce within the last backward; the passes before only accumulate.
            with nullcontext() if is_last else sync.no_sync():
                loss_sum, weight = sync.module(inputs, targets)
                if microbatch.samples == 0:  # a placeholder takes part in the collectives, but counts for nothing
                    loss_sum, weight = loss_sum * 0, weight * 0
                loss_sums.append(sync.detach_result(loss_sum))
                if sync.is_invariant or not weight_is_count:
                    weights.append(sync.detach_result(weight))
                if is_last and not weight_is_count and not sync.is_invariant:
                    global_weight = torch.stack(weights).sum()
                    if self.group.world_size > 1:
                        weight_reduction = dist.all_reduce(global_weight, async_op=True)
                # Start from `scale` instead of 1: the same bits as to scale the sum, and 2 % of a step faster.
                loss_sum.backward(loss_sum.new_full((), scale))
            if sync.is_invariant and (index + 1) % self.microbatches == 0:
                shard = slice(index + 1 - self.microbatches, index + 1)
                sync.add_shard_gradients(_sum(loss_sums[shard]), _sum(weights[shard]))
        global_sums = sync.all_reduce()
        metrics = StepMetrics(
            step=number,
            samples=batch.global_samples,
            loss_sum=_sum(loss_sums),
            weight=float(sum(each.samples for each in batch.microbatches)) if weight_is_count else _sum(weights),
            gradient_sums=sync.local_gradient_sums(),
            global_sums=global_sums,
            times=sync.timer.end(),
        )
        if not weight_is_count:
            if global_sums is not None:
                global_weight = global_sums[1]
            elif weight_reduction is not None:
                weight_reduction.wait()
            factor = averaged_over / global_weight
            for gradient in sync.gradients():
                gradient.mul_(factor)
        return metrics

    def _lbfgs(self, optimizer: optim.LBFGS, number: int, batch: StepBatch, data: Iterator[Batch]) -> StepMetrics:
        """Run a step of LBFGS and return the metrics of its first evaluation, before the weights move.

        LBFGS evaluates the batch several times and branches on the loss: every rank must see the global loss.
        """
        inputs = [next(data) for _ in batch.microbatches]
        evaluations: list[StepMetrics] = []

        def closure() -> float:
            self.gradient_sync.zero_grad()
            metrics = self.backward(number, batch, inputs)
            evaluations.append(metrics)
            sums = metrics.global_sums
            if sums is None:
                sums = torch.stack([metrics.loss_sum, torch.as_tensor(metrics.weight, device=self.group.device)])
                if self.group.world_size > 1:
                    dist.all_reduce(sums)
            loss_sum, weight = sums.tolist()
            if weight == 0:
                raise NonFiniteError(weightless_message(number), step=number)
            return float(loss_sum / weight)

        optimizer.step(closure)
        return evaluations[0]


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def weightless_message(step: int) -> str:
    """Return why the mean loss of a step is not defined."""
    return f"the loss's weights add up to 0 at step {step}: every sample is of a class with weight 0"
