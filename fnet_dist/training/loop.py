"""The training loop: one epoch as a generator of windows. It touches no files and no environment."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, tee

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.data.datasets import Batch, Dataset
from fnet_dist.data.sampler import GlobalBatchSampler, StepBatch
from fnet_dist.distributed.gpu_meter import NO_USAGE, GpuMeter
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.step_times import StepTimer
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.distributed.weight_check import compare_weights
from fnet_dist.errors import NonFiniteError
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.answers import Answers
from fnet_dist.training.step import Step, StepMetrics
from fnet_dist.training.step_sums import BadStep
from fnet_dist.training.window import MAX_WINDOW_STEPS, Window, WindowStart, close_window

MAX_SAMPLES = 8  # in a message
FAST_HASHES = 16  # times parallel.hash_every_steps, where a window has MAX_WINDOW_STEPS


@dataclass(frozen=True)
class StepSchedule:
    """The steps at which training ends, saves, evaluates and hashes its weights."""

    max_steps: int | None = None
    save_every_steps: int | None = None
    hash_every_steps: int | None = None
    evaluate_every_steps: int | None = None
    # By rank 0's clock; the argument is the epoch that has ended, or None within one.
    save_due: Callable[[int | None], bool] = lambda _: False

    def hash_interval(self, window_steps: int) -> int | None:
        """Return the number of steps between two hashes: fewer hashes where thousands of steps take half a second.

        There a thousand steps take less than the hash itself, on a GPU 0.06 s, and would cut each window short.
        """
        is_fast = window_steps >= MAX_WINDOW_STEPS
        return self.hash_every_steps and self.hash_every_steps * (FAST_HASHES if is_fast else 1)

    def steps_from(self, step: int, window_steps: int) -> int:
        """Return the number of steps from `step` until the next multiple at which something is due."""
        intervals = (self.save_every_steps, self.hash_interval(window_steps), self.evaluate_every_steps)
        return min((every - step % every for every in intervals if every is not None), default=MAX_WINDOW_STEPS)

    def room(self, step: int, left: int) -> int:
        """Return how many of the `left` steps of an epoch, after `step`, come before the next evaluation."""
        every = self.evaluate_every_steps
        return left if every is None else min(left, -step % every)


def train_epoch(
    step: Step,
    sampler: GlobalBatchSampler,
    dataset: Dataset,
    state: TrainState,
    stop: StopFlag,
    watchdog: Watchdog,
    schedule: StepSchedule = StepSchedule(),
    gpu_meter: GpuMeter | None = None,
    answers: Answers | None = None,
) -> Iterator[Window]:
    """Train from `state` to the end of its epoch (or to `schedule.max_steps`), and yield each window.

    When a window is yielded, `state` is that after its last step (with `failure`, after the bad step). Return early
    after a window with a `stop`. Raise NonFiniteError on all ranks, after yielding the good steps before the bad one.
    """
    left = sampler.steps_per_epoch - state.epoch_steps
    if schedule.max_steps is not None:
        left = min(left, schedule.max_steps - state.step)
    if left <= 0:  # nothing is read or sent
        return
    group = step.group
    answers = Answers(group, watchdog) if answers is None else answers
    sampler.set_position(state.epoch, state.epoch_steps)
    batches, ahead = tee(sampler.steps())  # the dataset reads ahead of the steps
    step.gradient_sync.module.train()
    indices = (microbatch.indices for batch in ahead for microbatch in batch.microbatches)
    with closing(dataset.batches(indices, sampler.sample_key)) as read:
        data = _observed(read, state, watchdog, step.gradient_sync.timer)
        while left > 0:
            most = min(left, state.window_steps, answers.begin_window(state.step))
            start = WindowStart(state.epoch, state.samples, time.perf_counter())
            length = min(most, schedule.steps_from(state.step, state.window_steps))
            # Build all index slices before the first step: between steps, each would cost cache misses.
            coming = answers.marked(list(islice(batches, length)), state.step)
            metrics = _take_steps(step, coming, data, state, answers.timing_stride(length))
            watchdog.heartbeat("waiting for all ranks after step", state.step)
            left -= length
            ask = answers.look(state.step, schedule.room(state.step, left))
            save_due = is_due(schedule.save_every_steps, state.step) or schedule.save_due(None if left else state.epoch)
            window = close_window(
                group,
                start,
                metrics,
                stop_reason=stop.look(),
                save_due=save_due,
                ask=ask,
                log_every_steps=step.grad_norm_every_steps,
                gpu=NO_USAGE if gpu_meter is None else gpu_meter.usage,
            )
            watchdog.restore_timeout()
            window = _compare_if_due(window, group, state, schedule, ends_epoch=left == 0)
            _count_window(state, window, length)
            answers.exchange(window)
            if window.steps:
                yield window
            if window.failure is not None:
                raise _non_finite_error(window.failure, sampler, state)
            if window.stop:
                return


def _take_steps(
    step: Step, batches: Iterable[StepBatch], data: Iterator[Batch], state: TrainState, stride: int
) -> list[StepMetrics]:
    """Take a step with each of `batches`, and time every `stride`-th."""
    metrics: list[StepMetrics] = []
    for index, batch in enumerate(batches, start=1):
        metrics.append(step.take(state.step + 1, batch, data, timed=index % stride == 0))
        state.step += 1
        state.samples += batch.global_samples
    return metrics


def _compare_if_due(
    window: Window, group: Group, state: TrainState, schedule: StepSchedule, *, ends_epoch: bool
) -> Window:
    """Compare the ranks' weights where they are logged or may be saved; return `window` with hashes that are logged."""
    if window.failure is not None:
        return window
    log_hashes = is_due(schedule.hash_interval(state.window_steps), state.step)
    # Before each save: a checkpoint must not be written from weights that differ between ranks.
    may_save = window.save or window.stop or ends_epoch or is_due(schedule.evaluate_every_steps, state.step)
    if log_hashes or (group.world_size > 1 and may_save):
        hashes = compare_weights(group, state.model, state.step)
        return replace(window, hashes=hashes if log_hashes else None)
    return window


def _count_window(state: TrainState, window: Window, length: int) -> None:
    state.window_steps = window.next_steps
    state.epoch_steps += length
    for record in window.steps:  # not sum(): the rounding must not depend on the windows' lengths
        state.epoch_loss_sum += record.loss
    state.epoch_samples += window.samples
    state.epoch_seconds += window.seconds


def _non_finite_error(bad: BadStep, sampler: GlobalBatchSampler, state: TrainState) -> NonFiniteError:
    """Return the error for a step of the last window, which names the samples of its global batch."""
    samples = sampler.global_batch(state.epoch_steps - 1 - (state.step - bad.step)).tolist()
    shown = f"its global batch has the samples {', '.join(map(str, samples[:MAX_SAMPLES]))}"
    more = f" ... (all {len(samples):,}: rank_0.error in the attempt's directory)" * (len(samples) > MAX_SAMPLES)
    return NonFiniteError(f"{bad.message}; {shown}{more}", bad.rank, bad.step, samples)


def is_due(every_steps: int | None, step: int) -> bool:
    """Return True if `step` is a multiple of `every_steps`; False if that is None."""
    return every_steps is not None and step % every_steps == 0


def _observed(data: Iterator[Batch], state: TrainState, watchdog: Watchdog, timer: StepTimer) -> Iterator[Batch]:
    """Yield the batches of `data`, and tell watchdog and timer whether this rank is reading or training."""
    while True:
        watchdog.heartbeat("reading data for step", state.step + 1)
        timer.read()
        batch = next(data, None)
        timer.compute()
        if batch is None:
            return
        watchdog.heartbeat("training, step", state.step + 1)
        yield batch
