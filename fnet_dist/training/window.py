"""A window: the steps of about half a second. One collective at its end gives all ranks the losses of each rank."""

import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.distributed.stragglers import compute_ms
from fnet_dist.run.metrics_log import mean_or_none
from fnet_dist.run.stop import decode_reason, encode_reason
from fnet_dist.training.step import StepMetrics, weightless_message

WINDOW_S = 0.5  # all ranks learn of a stop within one window, and have saved within another
MAX_WINDOW_STEPS = 4096
TIMED_STEPS = 25  # of a window, evenly spaced: enough for a median, and timing costs 0.5 % of a step of 7 ms


class StepRecord(NamedTuple):
    """A step as all ranks know it after the window's collective."""

    step: int
    samples: int  # since the start of the run
    loss: float  # mean over the global batch
    loss_per_rank: tuple[float | None, ...]  # mean over each rank's local batch; None if that was empty
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
    failure: str | None  # describes the first step that was not finite; `steps` then ends before it
    compute_ms: tuple[float, ...] = ()  # of each rank, see ComputeTimer: median over the timed steps; () if single rank
    hashes: dict[str, str] | None = None  # of the weights after the last step, if they are logged here

    @property
    def samples_per_second(self) -> float:
        """Return the global throughput."""
        return self.samples / self.seconds


def close_window(
    group: Group,
    epoch: int,
    samples_before: int,
    metrics: Sequence[StepMetrics],
    started: float,
    stop_reason: str,
    save_due: bool = False,
) -> Window:
    """Gather what every rank measured in the window's steps, and return the same Window on all ranks.

    This is the one collective of a window besides gradients, and the one place where the host waits for the device.
    `samples_before` is the number of samples seen before the window, `started` time.perf_counter() at its first step.
    """
    columns = _local_columns(metrics, group.device)
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)  # else `seconds` would be the time to queue the work
    seconds = time.perf_counter() - started
    compute, memory_gib = _median_compute_ms(metrics), peak_memory_gib(group.device)
    header = [encode_reason(stop_reason), _next_length(len(metrics), seconds), seconds, memory_gib, compute, save_due]
    row = torch.cat([torch.tensor(header, dtype=torch.float64, device=group.device), *columns])
    rows = gather_rows(group, row).cpu()
    stops, lengths, durations, memory, computes, saves = rows[:, : len(header)].T.tolist()  # a list over ranks each
    by_step = rows[:, len(header) :].view(group.world_size, len(columns), len(metrics)).permute(1, 2, 0)
    good, failure = _first_failure([each.step for each in metrics], by_step)
    records = _step_records(metrics[:good], samples_before, by_step)
    return Window(
        epoch=epoch,
        steps=records,
        samples=sum(each.samples for each in metrics[:good]),
        seconds=durations[0] * good / len(metrics),
        next_steps=int(lengths[0]),  # rank 0 decides
        max_memory_gib=max(memory),
        world_size=group.world_size,
        stop="" if failure else decode_reason(int(max(stops))),  # a bad step must be reported, and never saved
        save=bool(saves[0]) and failure is None,
        failure=failure,
        compute_ms=tuple(computes) if group.world_size > 1 else (),
    )


def _local_columns(metrics: Sequence[StepMetrics], device: torch.device) -> list[Tensor]:
    """Return loss sums, weights, gradient sums and gradient norms of the steps on this rank, float64 (steps,) each."""
    weights = [torch.as_tensor(each.weight, device=device) for each in metrics]
    sums = torch.stack([part for each in metrics for part in each.gradient_sums]).double()
    # A step has as many sums as DDP has buckets, and DDP rebuilds its buckets after the first step.
    steps = torch.tensor([index for index, each in enumerate(metrics) for _ in each.gradient_sums], device=device)
    zero = torch.zeros((), device=device)
    return [
        torch.stack([each.loss_sum for each in metrics]).double(),
        torch.stack(weights).double(),
        sums.new_zeros(len(metrics)).index_add_(0, steps, sums),
        torch.stack([zero if each.grad_norm is None else each.grad_norm for each in metrics]).double(),
    ]


def _step_records(metrics: Sequence[StepMetrics], samples_before: int, by_step: Tensor) -> tuple[StepRecord, ...]:
    """Return a record of each step in `metrics`; `by_step` is (4, steps, ranks), see _local_columns.

    A mean loss is a loss sum over a weight: those of all ranks give the step's loss, a rank's own give its loss.
    """
    loss_sums, weights, _, norms = by_step[:, : len(metrics)].tolist()
    shard_sums = [each.global_sums for each in metrics if each.global_sums is not None]
    if shard_sums:  # the tree of logical shards has added them up, with the same bits at any number of ranks
        totals = torch.stack(shard_sums).tolist()
    else:  # fsum is exact, so the order of ranks does not matter
        totals = [(math.fsum(of_step), math.fsum(weights[index])) for index, of_step in enumerate(loss_sums)]
    samples = list(accumulate((each.samples for each in metrics), initial=samples_before))
    return tuple(
        StepRecord(
            step=each.step,
            samples=samples[index + 1],
            loss=total / weight,
            loss_per_rank=tuple(map(mean_or_none, loss_sums[index], weights[index])),
            lr=each.lr,
            grad_norm=None if each.grad_norm is None else norms[index][0],
            time=each.time,
        )
        for index, (each, (total, weight)) in enumerate(zip(metrics, totals, strict=True))
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


def _median_compute_ms(metrics: Sequence[StepMetrics]) -> float:
    """Return this rank's compute time in a step, ms. The median: the system may have held up a few steps."""
    timed = [compute_ms(each.compute_time) for each in metrics if each.compute_time]
    return statistics.median(timed) if timed else 0.0  # a single rank


def _first_failure(steps: Sequence[int], by_step: Tensor) -> tuple[int, str | None]:
    """Return how many steps come before the first that is not finite, and a message about that one (None if none)."""
    measured = by_step[[0, 2, 3]]  # without the weights
    weightless, is_bad = by_step[1].sum(dim=1) == 0, ~measured.isfinite()
    failed = (weightless | is_bad.any(dim=2).any(dim=0)).nonzero().flatten().tolist()
    if not failed:
        return len(steps), None
    index, step = failed[0], steps[failed[0]]
    if weightless[index]:
        return index, weightless_message(step)
    quantity, rank = is_bad[:, index].nonzero()[0].tolist()
    name = ("loss", "gradient", "gradient norm")[quantity]
    return index, (
        f"{name} is {measured[quantity, index, rank]} at step {step} on rank {rank}; nothing was written from it: "
        "try a smaller --optim.lr, --optim.max-grad-norm 1, or look for bad samples in the data"
    )
