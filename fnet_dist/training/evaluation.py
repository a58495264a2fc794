"""Evaluate a model over a data set: each sample once, with the same result at any number of ranks."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.errors import ConfigError, NonFiniteError
from fnet_dist.loss import Loss
from fnet_dist.metrics import Metrics
from fnet_dist.run.stop import StopFlag, StopRequested
from fnet_dist.training.window import agree_to_stop


@dataclass(frozen=True)
class Evaluation:
    """Loss and metrics over all samples; None for a value that is not finite.

    Of a classifier also `predicted` and `true`, int64 (count,), and each sample's cross entropy `losses`, float64
    (count,), in the data set's order; 0 where the target is no class.
    """

    loss: float
    metrics: dict[str, float | None]
    count: int
    seconds: float = 0.0
    predicted: Tensor | None = None
    true: Tensor | None = None
    losses: Tensor | None = None

    def value(self, name: str) -> float | None:
        """Return the loss, or a metric."""
        return self.loss if name == "loss" else self.metrics[name]


@dataclass(frozen=True)
class Evaluator:
    """Model, loss, metrics and data of an evaluation. `key` is that of the samples' random draws (see Dataset)."""

    model: nn.Module
    loss: Loss
    metrics: tuple[Metrics, ...]
    dataset: Dataset
    group: Group
    batch_size: int
    key: int = 0

    def run_batch(self, inputs: Any, targets: Any, samples: int) -> tuple[Tensor, list[str], Tensor | None]:
        """Return the batch's sums, float64 (sums,), their names, and of a classifier what it predicted.

        The first two sums are the loss and its weight. Predictions are predicted class, true class and cross entropy,
        float64 (3, samples): all of them travel in one collective.
        """
        outputs = self.model(inputs)
        loss_sum, weight = self.loss(outputs, targets)
        sums = {"loss": loss_sum, "weight": weight}
        for number, metrics in enumerate(self.metrics):  # two metrics may use the same name
            sums |= {f"{number}/{name}": value for name, value in metrics.sums(outputs, targets).items()}
        row = torch.stack([torch.as_tensor(each, device=self.group.device).double() for each in sums.values()])
        predictions = None
        if self.dataset.info.class_names and _are_classes(outputs, targets, samples):
            # Of log probabilities, as of any outputs that differ from them by a constant, it is the same. A target that
            # is no class, which a loss may ignore, has none.
            is_class = (targets >= 0) & (targets < outputs.shape[1])
            losses = cross_entropy(outputs.float(), targets.where(is_class, 0), reduction="none").where(is_class, 0.0)
            predictions = torch.stack([outputs.argmax(dim=1).double(), targets.double(), losses.double()])
        return row, list(sums), predictions

    def metric_values(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Return each metric's value, given the sums over all samples under run_batch's names."""
        values: dict[str, float | None] = {}
        for number, metrics in enumerate(self.metrics):
            start = f"{number}/"
            own = {name.removeprefix(start): total for name, total in sums.items() if name.startswith(start)}
            values |= {name: v if math.isfinite(v) else None for name, v in metrics.values(own).items()}
        return values


def _are_classes(outputs: Any, targets: Any, samples: int) -> bool:
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return both and outputs.ndim == 2 and targets.shape == (samples,) and not targets.is_floating_point()


@torch.no_grad()
def check_one_batch(evaluator: Evaluator) -> None:
    """Run the first batch of the test data, so that a fault shows before step 1 and not after an epoch.

    Raise ConfigError if the loss does not keep its promise `weight_is_count`, or a metric lacks a value.
    """
    evaluator.model.eval()
    indices = torch.arange(min(evaluator.batch_size, len(evaluator.dataset)))
    inputs, targets = evaluator.dataset.batch(indices, evaluator.key)
    row, names, _ = evaluator.run_batch(inputs, targets, len(indices))
    weight = row[1].item()
    if getattr(evaluator.loss, "weight_is_count", False) and weight != len(indices):
        raise ConfigError(
            f"the loss has weight_is_count True, and returned weight {weight:g} for {len(indices)} samples; return the "
            "number of samples, or leave weight_is_count out"
        )
    sums = dict(zip(names, row.tolist(), strict=True))
    found = evaluator.metric_values(sums)
    for metrics in evaluator.metrics:
        if lacking := metrics.better.keys() - found.keys():
            raise ConfigError(f"metrics: values() returned no {min(lacking)!r}, which `better` names")


@dataclass
class _Progress:
    """Progress of an evaluation: tells the watchdog, and asks all ranks for a stop once a window."""

    evaluator: Evaluator
    heartbeat: Callable[[str, int], None]
    step: int
    window: int
    stop: StopFlag | None
    done: int = 0
    started: float = field(default_factory=time.perf_counter)

    def after_batch(self, number: int) -> None:
        """Count batch `number`, from 1. Raise StopRequested on all ranks if one was asked to stop."""
        if self.stop is None or number - self.done != self.window:
            return
        self.heartbeat("waiting for all ranks in the evaluation at step", self.step)
        seconds = time.perf_counter() - self.started
        reason, self.window = agree_to_stop(self.evaluator.group, self.stop.look(), self.window, seconds)
        self.done, self.started = number, time.perf_counter()
        if reason:
            raise StopRequested(reason)


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    heartbeat: Callable[[str, int], None] = lambda where, number: None,
    state: TrainState | None = None,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Run the model over each sample of the data set once, and return the same Evaluation on every rank.

    Batches are dealt out to the ranks in turn. `heartbeat` is a Watchdog's; `state` tells the step and the length of a
    window. Raise on all ranks NonFiniteError, or StopRequested if `stop` was set on one.
    """
    model, group, began = evaluator.model, evaluator.group, time.perf_counter()
    step, window = (0, 1) if state is None else (state.step, state.window_steps)
    heartbeat("reading test data after step", step)
    was_training = model.training
    model.eval()
    if group.world_size > 1:
        for buffer in model.buffers():  # running statistics differ between ranks until DDP's next forward
            dist.broadcast(buffer, 0)
    progress = _Progress(evaluator, heartbeat, step, window, stop)
    rows, names, predictions = _run_batches(evaluator, progress)
    model.train(was_training)
    heartbeat("waiting for all ranks after the evaluation at step", step)
    by_rank = gather_rows(group, rows.flatten()).cpu().view(group.world_size, *rows.shape)
    totals = by_rank[:, :, 0].sum(dim=1).tolist()
    if bad := [rank for rank, total in enumerate(totals) if not math.isfinite(total)]:
        message = (
            f"test loss is {totals[bad[0]]} after step {step} on rank {bad[0]}; try a smaller --optim.lr, or look for "
            "bad samples in the test data"
        )
        raise NonFiniteError(message, bad[0] if len(bad) == 1 else None)
    # fsum is exact, so the sums do not depend on which rank evaluated which batch.
    sums = dict(zip(names, map(_exact_sum, by_rank.flatten(0, 1).T.tolist()), strict=True))
    predicted = true = losses = None
    if predictions is not None:
        of_ranks = gather_rows(group, predictions.flatten()).cpu().view(group.world_size, *predictions.shape)
        # Rank r evaluated batches r, r + world_size, ...: back to the data set's order.
        predicted, true, losses = of_ranks.permute(2, 1, 0, 3).reshape(3, -1)[:, : len(evaluator.dataset)]
        predicted, true = predicted.long(), true.long()
    seconds = time.perf_counter() - began
    values = evaluator.metric_values(sums)
    loss, count = sums["loss"] / sums["weight"], len(evaluator.dataset)
    return Evaluation(loss, values, count, seconds, predicted, true, losses)


def _run_batches(evaluator: Evaluator, progress: _Progress) -> tuple[Tensor, list[str], Tensor | None]:
    """Return this rank's sums, float64 (batches, sums), their names, and predictions (batches, 3, batch_size).

    The ranks' numbers of batches are equal: a missing one has sums of zero, and no samples.
    """
    group = evaluator.group
    batches = torch.arange(len(evaluator.dataset)).split(evaluator.batch_size)
    most = -(-len(batches) // group.world_size)  # batches of rank 0; the last ranks may have one less
    own = batches[group.rank :: group.world_size]
    read = own or batches[:1]  # a rank without a batch runs one all the same, to know the sums' names
    rows: Tensor | None = None
    names, predictions = list[str](), None
    with closing(evaluator.dataset.batches(iter(read), evaluator.key)) as data:
        for number in range(1, most + 1):  # as often on every rank: after_batch has a collective
            if number <= len(read):
                inputs, targets = next(data)
                progress.heartbeat("evaluating, batch", number)
                samples = len(read[number - 1])
                row, names, found = evaluator.run_batch(inputs, targets, samples)
                if rows is None:
                    rows = row.new_zeros(most, len(row))
                if number <= len(own):
                    rows[number - 1] = row
                if found is not None:
                    if predictions is None:
                        predictions = found.new_zeros(most, 3, evaluator.batch_size)
                    predictions[number - 1, :, :samples] = found
            progress.after_batch(number)
    assert rows is not None  # most >= 1, and so is len(read)
    return rows, names, predictions


def _exact_sum(column: list[float]) -> float:
    return math.fsum(column) if all(map(math.isfinite, column)) else sum(column)  # fsum refuses inf - inf
