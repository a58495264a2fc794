"""The loop: an epoch of training as a generator of windows, and evaluation. No files, no environment."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, tee

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.data.datasets import Batch, Dataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.distributed.weight_check import compare_weights
from fnet_dist.errors import NonFiniteError
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.step import Step
from fnet_dist.training.window import MAX_WINDOW_STEPS, Taken, Window, close_window, timing_stride


@dataclass(frozen=True)
class StepSchedule:
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
    guard: Watchdog,
    schedule: StepSchedule = StepSchedule(),
) -> Iterator[Window]:
    """Train from `state` to the end of its epoch (or to `schedule.max_steps`), a window at a time.

    The state stands at the window's last step when the window is yielded. Ends early, after a window whose `stop` is
    set. Raises NonFiniteError on all ranks, after yielding the good steps before the bad one.
    """
    left = sampler.steps_per_epoch - state.epoch_steps
    if schedule.max_steps is not None:
        left = min(left, schedule.max_steps - state.step)
    if left <= 0:
        return
    sampler.set_position(state.epoch, state.epoch_steps)
    batches, ahead = tee(sampler.steps())
    step.exchange.module.train()
    with closing(dataset.batches(microbatch.indices for batch in ahead for microbatch in batch.microbatches)) as read:
        data = _watched(read, state, guard)
        while left > 0:
            taken = []
            started = time.perf_counter()
            length = min(left, state.window_steps, schedule.steps_from(state.step))
            for index, batch in enumerate(list(islice(batches, length)), start=1):  # sliced in one go: caches stay warm
                number = state.step + 1
                result = step.take(number, batch, data, timed=index % timing_stride(length) == 0)
                taken.append(Taken(number, state.samples, result, time.time()))
                state.step, state.samples = number, state.samples + result.samples
            guard.heartbeat("waiting for all ranks after step", state.step)
            window = close_window(step.group, state.epoch, taken, started, stop.look(), schedule.save_after(state.step))
            guard.started()
            left -= len(taken)
            on_record = schedule.hash_after(state.step)
            saved = step.group.world_size > 1 and (window.save or window.stop or left == 0)
            if window.failure is None and (on_record or saved):
                hashes = compare_weights(step.group, step.exchange.model, state.step)
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


def _watched(data: Iterator[Batch], state: TrainState, guard: Watchdog) -> Iterator[Batch]:
    """The same batches; a rank that hangs says whether it was reading or training."""
    guard.heartbeat("reading data for step", state.step + 1)
    for batch in data:
        guard.heartbeat("training, step", state.step + 1)
        yield batch
        guard.heartbeat("reading data for step", state.step + 1)
