"""Evaluate a model over a data set: each sample once, with the same result at any number of ranks."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.errors import NonFiniteError
from fnet_dist.loss import Loss
from fnet_dist.run.stop import StopFlag, StopRequested
from fnet_dist.training.window import agree_to_stop


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over all samples; `predicted` and `true`, int64 (count,), are in the data set's order."""

    loss: float
    correct: int
    count: int
    predicted: Tensor
    true: Tensor

    @property
    def accuracy(self) -> float:
        """Return the fraction of samples whose class is predicted right."""
        return self.correct / self.count


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    group: Group,
    batch_size: int,
    heartbeat: Callable[[str, int], None] = lambda where, number: None,
    state: TrainState | None = None,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Run `model` over each sample of `dataset` once, and return the same Evaluation on every rank.

    Batches of `batch_size` are dealt out to the ranks in turn. `heartbeat` is a Watchdog's; `state` tells the step and
    the length of a window. Raise on all ranks NonFiniteError, or StopRequested if `stop` was set on one.
    """
    step, window = (0, 1) if state is None else (state.step, state.window_steps)
    heartbeat("reading test data after step", step)
    was_training = model.training
    model.eval()
    if group.world_size > 1:
        for buffer in model.buffers():  # running statistics differ between ranks until DDP's next forward
            dist.broadcast(buffer, 0)
    batches = torch.arange(len(dataset)).split(batch_size)
    most = -(-len(batches) // group.world_size)  # batches of rank 0; the last ranks may have one less
    local_batches = batches[group.rank :: group.world_size]
    # For each batch [loss sum, predicted classes...] and [weight, true classes...]: float64 holds classes exactly.
    results = torch.zeros(most, 2, 1 + batch_size, dtype=torch.float64, device=group.device)
    done, started = 0, time.perf_counter()
    with closing(dataset.batches(iter(local_batches))) as data:
        for number in range(1, most + 1):  # as often on every rank: agree_to_stop is a collective
            inputs, targets = next(data, (None, None))
            if inputs is not None and targets is not None:
                heartbeat("evaluating, batch", number)
                outputs = model(inputs)
                results[number - 1, :, 0] = torch.stack([value.double() for value in loss(outputs, targets)])
                results[number - 1, :, 1 : 1 + len(targets)] = torch.stack([outputs.argmax(dim=1), targets])
            if stop is not None and number - done == window:
                heartbeat("waiting for all ranks in the evaluation at step", step)
                reason, window = agree_to_stop(group, stop.look(), window, time.perf_counter() - started)
                done, started = number, time.perf_counter()
                if reason:
                    raise StopRequested(reason)
    model.train(was_training)
    heartbeat("waiting for all ranks after the evaluation at step", step)
    by_rank = gather_rows(group, results.flatten()).cpu().view(group.world_size, most, 2, 1 + batch_size)
    for rank, total in enumerate(by_rank[:, :, 0, 0].sum(dim=1).tolist()):
        if not math.isfinite(total):
            raise NonFiniteError(
                f"test loss is {total} after step {step} on rank {rank}; try a smaller --optim.lr, or look for bad "
                "samples in the test data"
            )
    # Rank r evaluated batches r, r + world_size, ...: back to the data set's order.
    predicted, true = by_rank[..., 1:].long().permute(2, 1, 0, 3).reshape(2, -1)[:, : len(dataset)]
    # fsum is exact, so the loss does not depend on which rank evaluated which batch.
    total, weight = (math.fsum(column) for column in by_rank[..., 0].flatten(0, 1).T.tolist())
    return Evaluation(total / weight, int((predicted == true).sum()), len(dataset), predicted, true)
