"""A window: the steps of about half a second. One collective at its end gives all ranks the losses of each rank."""

import math
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fnet_dist.distributed.gpu_meter import NO_USAGE, GpuUsage
from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.distributed.step_times import StepTimes, step_times
from fnet_dist.run.metrics_log import GPU_SPREADS, TIME_SPREADS
from fnet_dist.run.stop import decode_reason, encode_reason
from fnet_dist.training.step import StepMetrics
from fnet_dist.training.step_sums import BadStep, StepSums, are_few, local_columns, sums_of_few, sums_of_many

WINDOW_S = 0.5  # all ranks learn of a stop within one window, and have saved within another
MAX_WINDOW_STEPS = 4096
# Figures that each rank sends about itself, besides its steps, in the order of StepTimes and GpuUsage.
OF_EACH_RANK = (*TIME_SPREADS, *GPU_SPREADS)
TIMED_STEPS = 25  # of a window, evenly spaced: enough for a median, and timing costs 0.5 % of a step of 7 ms


class StepRecord(NamedTuple):
    """A step as all ranks know it after the window's collective."""

    step: int
    samples: int  # since the start of the run
    loss: float  # mean over the global batch
    loss_per_rank: tuple[float | None, ...] | None  # see StepSums
    loss_min: float | None
    loss_max: float | None
    worst_rank: int | None
    lr: float
    grad_norm: float | None
    time: float  # Unix time, seconds


@dataclass(frozen=True)
class Window:
    """The steps since the last collective, the same on all ranks."""

    epoch: int
    steps: tuple[StepRecord, ...]
    samples: int  # in these steps
    seconds: float
    next_steps: int  # length of the next window
    max_memory_gib: float  # of the rank that has used the most
    world_size: int
    stop: str  # a reason of outcome.json, or "" to go on
    save: bool  # a checkpoint is due here
    failure: BadStep | None  # the first step that was not finite; `steps` then ends before it
    # Of each rank, (ranks,) float64: OF_EACH_RANK, NaN where nothing was measured, and "busy_ms", the time for data and
    # computation. That is the median over the timed steps: the system may have held up a few.
    by_rank: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    hashes: dict[str, str] | None = None  # of the weights after the last step, if they are logged here
    ask: int = 0  # the highest that a rank has sent, see answers.py

    @property
    def samples_per_second(self) -> float:
        """Return the global throughput."""
        return self.samples / self.seconds


@dataclass(frozen=True)
class WindowStart:
    """The beginning of a window."""

    epoch: int
    samples: int  # seen before it
    time: float  # time.perf_counter()


def close_window(
    group: Group,
    start: WindowStart,
    metrics: Sequence[StepMetrics],
    *,
    stop_reason: str = "",
    save_due: bool = False,
    ask: int = 0,
    log_every_steps: int = 1,
    gpu: GpuUsage = NO_USAGE,
) -> Window:
    """Exchange what every rank measured in the window's steps, and return the same Window on all ranks.

    Besides gradients these are the only collectives, and it is the one place where the host waits for the device.
    With many ranks, all of them send their losses of each `log_every_steps`-th step.
    """
    columns = local_columns(metrics, group.device)
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)  # else `seconds` would be the time to queue the work
    seconds = time.perf_counter() - start.time
    busy_ms, times = _measured_times(metrics)
    numbers = [encode_reason(stop_reason), _next_length(len(metrics), seconds), seconds, save_due]
    numbers += [ask, peak_memory_gib(group.device), busy_ms, *times, *gpu]
    header = torch.tensor(numbers, dtype=torch.float64, device=group.device)
    if are_few(group):  # all in one collective
        rows = gather_rows(group, torch.cat([header, columns.flatten()])).cpu()
        headers, by_rank = rows[:, : len(header)], rows[:, len(header) :].view(group.world_size, 4, len(metrics))
        sums = sums_of_few(metrics, by_rank)
    else:
        headers = gather_rows(group, header).cpu()
        sums = sums_of_many(group, metrics, columns, log_every_steps)
    (_, next_steps, duration, save, *_), good = headers[0].tolist(), len(sums.losses)
    stops, _, _, _, asks, memory_gib, *columns_of_ranks = headers.T
    return Window(
        epoch=start.epoch,
        steps=_step_records(metrics[:good], start.samples, sums),
        samples=sum(each.samples for each in metrics[:good]),
        seconds=duration * good / len(metrics),
        next_steps=int(next_steps),  # rank 0 decides
        max_memory_gib=float(memory_gib.max()),
        world_size=group.world_size,
        stop="" if sums.failure else decode_reason(int(stops.max())),  # a bad step must be reported, and never saved
        save=bool(save) and sums.failure is None,
        failure=sums.failure,
        ask=int(asks.max()),
        by_rank=dict(zip(("busy_ms", *OF_EACH_RANK), columns_of_ranks, strict=True)),
    )


def _step_records(metrics: Sequence[StepMetrics], samples_before: int, sums: StepSums) -> tuple[StepRecord, ...]:
    """Return a record of each step of `metrics`, of which `sums` tells what all ranks measured."""
    samples = accumulate((each.samples for each in metrics), initial=samples_before)
    next(samples)
    columns = zip(metrics, samples, sums.losses, sums.per_rank, sums.extremes, sums.grad_norms, strict=True)
    return tuple(
        # By position: names would take half a microsecond more, and there are thousands of steps a second.
        StepRecord(
            each.step,
            seen,
            loss,
            per_rank,
            lowest,
            highest,
            worst,
            each.lr,
            None if each.grad_norm is None else norm,
            each.time,
        )
        for each, seen, loss, per_rank, (lowest, highest, worst), norm in columns
    )


def timing_stride(steps: int) -> int:
    """Return n such that timing every n-th step of a window of `steps` times about TIMED_STEPS, and at least one."""
    return max(1, steps // TIMED_STEPS)


def agree_to_stop(group: Group, stop_reason: str, done: int = 1, seconds: float = WINDOW_S) -> tuple[str, int]:
    """Return the agreed reason to stop ("" to go on) and the number of batches until the next call, on all ranks.

    For places without training steps: before the first step, and in evaluations. `done` batches took this rank
    `seconds`; rank 0's figures count.
    """
    row = torch.tensor([encode_reason(stop_reason), _next_length(done, seconds)], device=group.device)
    rows = gather_rows(group, row).tolist()
    return decode_reason(max(row[0] for row in rows)), rows[0][1]


def _next_length(done: int, seconds: float) -> int:
    """Return how many steps fill a window, if `done` of them took `seconds`; at most eight times `done`."""
    return min(max(1, int(done * WINDOW_S / max(seconds, 1e-9))), 8 * done, MAX_WINDOW_STEPS)


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory: on a GPU what torch has allocated, on the CPU the process's RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _measured_times(metrics: Sequence[StepMetrics]) -> tuple[float, StepTimes]:
    """Return this rank's median time for data and computation, and its mean times, ms; of the timed steps."""
    timed = [step_times(each.times) for each in metrics if each.times]
    if not timed:
        return math.nan, StepTimes(math.nan, math.nan, math.nan)
    busy_ms = statistics.median(each.data + each.compute for each in timed)
    return busy_ms, StepTimes(*(statistics.fmean(column) for column in zip(*timed, strict=True)))
