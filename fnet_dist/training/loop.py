"""The loop: an epoch of training as a generator of windows, and evaluation. No files, no environment."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, tee

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.data.datasets import Batch, Dataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.distributed.watchdog import HangGuard
from fnet_dist.distributed.weight_check import agree_on_weights
from fnet_dist.errors import NonFiniteError
from fnet_dist.loss import Loss
from fnet_dist.run.stop import AskedToStop, StopFlag
from fnet_dist.training.step import Step
from fnet_dist.training.window import MAX_WINDOW_STEPS, Taken, Window, agree_to_stop, close_window, timed_every


@dataclass(frozen=True)
class Pace:
    """Where training pauses: after `max_steps`, at each multiple of `save_every_steps`, when rank 0's clock says so.

    All weights are hashed at each multiple of `hash_every_steps`, and compared there and before each save.
    """

    max_steps: int | None = None
    save_every_steps: int | None = None
    hash_every_steps: int | None = None
    save_due: Callable[[], bool] = lambda: False

    def steps_from(self, step: int) -> int:
        """Steps from `step` on until a save or a hash is due by their number."""
        grids = (self.save_every_steps, self.hash_every_steps)
        return min((every - step % every for every in grids if every is not None), default=MAX_WINDOW_STEPS)

    def save_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        by_number = self.save_every_steps is not None and step % self.save_every_steps == 0
        return by_number or self.save_due()

    def hash_after(self, step: int) -> bool:
        """Whether the weights after `step` go on record."""
        return self.hash_every_steps is not None and step % self.hash_every_steps == 0


def train_epoch(
    step: Step,
    sampler: GlobalBatchSampler,
    dataset: Dataset,
    state: TrainState,
    stop: StopFlag,
    guard: HangGuard,
    pace: Pace = Pace(),
) -> Iterator[Window]:
    """Train from `state` to the end of its epoch (or to `pace.max_steps`), a window at a time.

    The state stands at the window's last step when the window is yielded. Ends early, after a window whose `stop` is
    set. Raises NonFiniteError on all ranks, after yielding the good steps before the bad one.
    """
    left = sampler.steps_per_epoch - state.epoch_steps
    if pace.max_steps is not None:
        left = min(left, pace.max_steps - state.step)
    if left <= 0:
        return
    sampler.set_position(state.epoch, state.epoch_steps)
    batches, ahead = tee(sampler.steps())
    step.exchange.module.train()
    with closing(dataset.batches(piece.indices for batch in ahead for piece in batch.pieces)) as read:
        data = _watched(read, state, guard)
        while left > 0:
            taken = []
            started = time.perf_counter()
            length = min(left, state.window_steps, pace.steps_from(state.step))
            for index, batch in enumerate(list(islice(batches, length)), start=1):  # sliced in one go: caches stay warm
                number = state.step + 1
                result = step.take(number, batch, data, timed=index % timed_every(length) == 0)
                taken.append(Taken(number, state.samples, result, time.time()))
                state.step, state.samples = number, state.samples + result.samples
            guard.beat("waiting for all ranks after step", state.step)
            window = close_window(step.group, state.epoch, taken, started, stop.look(), pace.save_after(state.step))
            guard.started()
            left -= len(taken)
            on_record = pace.hash_after(state.step)
            saved = step.group.world_size > 1 and (window.save or window.stop or left == 0)
            if window.failure is None and (on_record or saved):
                hashes = agree_on_weights(step.group, step.exchange.model, state.step)
                window = replace(window, hashes=hashes if on_record else None)
            state.window_steps = window.next_steps
            state.epoch_steps += len(taken)
            for one in window.steps:  # one by one: where windows end depends on the clock, the sum must not
                state.epoch_loss_sum += one.loss
            state.epoch_samples += window.samples
            state.epoch_seconds += window.seconds
            if window.steps:
                yield window
            if window.failure is not None:
                raise NonFiniteError(window.failure)
            if window.stop:
                return


def _watched(data: Iterator[Batch], state: TrainState, guard: HangGuard) -> Iterator[Batch]:
    """The same batches; a rank that hangs says whether it was reading or training."""
    guard.beat("reading data for step", state.step + 1)
    for batch in data:
        guard.beat("training, step", state.step + 1)
        yield batch
        guard.beat("reading data for step", state.step + 1)


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over every sample once; `predicted` and `true` (count,) int64 are in the data set's order."""

    loss: float
    correct: int
    count: int
    predicted: Tensor
    true: Tensor

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    group: Group,
    batch_size: int,
    beat: Callable[[str, int], None] = lambda where, number: None,
    state: TrainState | None = None,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Run `model` over each sample exactly once, rank r taking every world_size-th; sums first, then the division.

    `batch_size` is per rank, `beat` a HangGuard's, `state` says which step this is and how long a window. Gives the
    same on every rank. Raises on all ranks NonFiniteError, or AskedToStop if `stop` was set on one.
    """
    step, window = (0, 1) if state is None else (state.step, state.window_steps)
    beat("reading test data after step", step)
    was_training = model.training
    model.eval()
    if group.world_size > 1:
        for buffer in model.buffers():  # running statistics differ between ranks until DDP's next forward
            dist.broadcast(buffer, 0)
    batches = torch.arange(len(dataset)).split(batch_size)  # each wholly on one rank
    most = -(-len(batches) // group.world_size)
    own = batches[group.rank :: group.world_size]
    classes = torch.zeros(most, 2, batch_size, dtype=torch.int64, device=group.device)
    sums = torch.zeros(most, 2, dtype=torch.float64, device=group.device)
    done, started = 0, time.perf_counter()
    with closing(dataset.batches(iter(own))) as data:
        for number in range(1, most + 1):  # as many on every rank; the last may be missing
            inputs, targets = next(data, (None, None))
            if inputs is not None and targets is not None:
                beat("evaluating, batch", number)
                outputs = model(inputs)
                sums[number - 1] = torch.stack([value.double() for value in loss(outputs, targets)])
                classes[number - 1, 0, : len(targets)] = outputs.argmax(dim=1)
                classes[number - 1, 1, : len(targets)] = targets
            if stop is not None and number - done == window:
                beat("waiting for all ranks in the evaluation at step", step)
                asked, window = agree_to_stop(group, stop.look(), window, time.perf_counter() - started)
                done, started = number, time.perf_counter()
                if asked:
                    raise AskedToStop(asked)
    model.train(was_training)
    beat("waiting for all ranks after the evaluation at step", step)
    by_rank = gather_rows(group, sums.flatten()).cpu().view(group.world_size, most, 2)
    for rank, total in enumerate(by_rank[:, :, 0].sum(dim=1).tolist()):
        if not math.isfinite(total):
            raise NonFiniteError(
                f"test loss is {total} after step {step} on rank {rank}; try a smaller --optim.lr, or look for bad "
                "samples in the test data"
            )
    rows = gather_rows(group, classes.flatten()).cpu().view(group.world_size, most, 2, batch_size)
    # Batch b was the rank's b % world_size.
    predicted, true = rows.permute(2, 1, 0, 3).reshape(2, -1)[:, : len(dataset)]
    total, weight = (math.fsum(column) for column in by_rank.flatten(0, 1).T.tolist())  # exact: in any order
    return Evaluation(total / weight, int((predicted == true).sum()), len(dataset), predicted, true)
