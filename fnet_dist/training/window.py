"""A window: some steps, about half a second of them, and the one collective in which all ranks learn what happened."""

import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.distributed.stragglers import compute_ms
from fnet_dist.run.metrics_log import mean_or_none
from fnet_dist.run.stop import decode_reason, encode_reason
from fnet_dist.training.step import StepResult

WINDOW_S = 0.5  # a stop is seen within one window, and saved within another
MAX_WINDOW_STEPS = 4096
TIMED_STEPS = 25  # of a window, evenly: enough for a median, and asking for the time costs 0.5 % of a step of 7 ms
_HEADER = 6  # reason to stop, length of the next window, seconds, peak memory in GiB, own ms, whether a save is due


class StepRecord(NamedTuple):
    """A step as all ranks know it: losses are means, over the global batch and over each rank's share."""

    step: int
    samples: int
    loss: float
    loss_per_rank: tuple[float | None, ...]
    lr: float
    grad_norm: float | None
    time: float


@dataclass(frozen=True)
class Window:
    """The steps since the last collective. `stop` is a reason of outcome.json or ""; `save` says that a checkpoint is
    due here; `failure` names a step and rank where a loss or gradient was not finite: `steps` then ends before it.
    `own_ms` is each rank's own time in a step (see OwnTime), the median over the window; none in a world of one.
    `hashes` are of the weights after the last step, where they go on record."""

    epoch: int
    steps: tuple[StepRecord, ...]
    samples: int
    seconds: float
    next_steps: int
    max_memory_gib: float
    world_size: int
    stop: str
    save: bool
    failure: str | None
    compute_ms: tuple[float, ...] = ()
    hashes: dict[str, str] | None = None

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


class Taken(NamedTuple):
    """A step that this rank has run, before the collective."""

    step: int
    samples_before: int
    result: StepResult
    time: float


def close_window(
    group: Group, epoch: int, taken: Sequence[Taken], started: float, stop_reason: str, save_due: bool = False
) -> Window:
    """The one collective: losses, weights, gradients' sums and norms, stop flag, times and memory of each rank, to all.

    It is also the one place where the host waits for the device. `started` is time.perf_counter() at the window's
    first step; rank 0's `save_due` counts.
    """
    results = [one.result for one in taken]
    divisors = torch.stack([torch.as_tensor(result.weight, device=group.device) for result in results]).double()
    losses = torch.stack([result.loss_sum for result in results]).double()
    columns = torch.stack([losses, divisors, _gradient_sums(results), _grad_norms(results)])
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)  # or the time would be that of queueing the work
    seconds = time.perf_counter() - started
    header = torch.tensor(
        [
            encode_reason(stop_reason),
            _next_length(len(taken), seconds),
            seconds,
            peak_memory_gib(group.device),
            _own_ms(results),
            save_due,
        ],
        dtype=torch.float64,
    )
    rows = gather_rows(group, torch.cat([header.to(group.device), columns.flatten()])).cpu()
    headers = rows[:, :_HEADER].tolist()
    sums, weights, gradients, norms = (
        rows[:, _HEADER:].reshape(group.world_size, 4, len(taken)).permute(1, 2, 0).tolist()
    )
    means = _means_of_shards(results)
    good, failure = _first_failure([one.step for one in taken], sums, weights, gradients, norms)
    steps = tuple(
        StepRecord(
            step=one.step,
            samples=one.samples_before + one.result.samples,
            loss=means[index] if means else math.fsum(sums[index]) / math.fsum(weights[index]),
            loss_per_rank=tuple(map(mean_or_none, sums[index], weights[index])),
            lr=one.result.lr,
            grad_norm=None if one.result.grad_norm is None else norms[index][0],
            time=one.time,
        )
        for index, one in enumerate(taken[:good])
    )
    return Window(
        epoch=epoch,
        steps=steps,
        samples=sum(one.result.samples for one in taken[:good]),
        seconds=headers[0][2] * good / len(taken),
        next_steps=int(headers[0][1]),
        max_memory_gib=max(header[3] for header in headers),
        world_size=group.world_size,
        stop=decode_reason(int(max(header[0] for header in headers))),
        save=bool(headers[0][5]) and failure is None,
        failure=failure,
        compute_ms=tuple(header[4] for header in headers) if group.world_size > 1 else (),
    )


def timing_stride(steps: int) -> int:
    """Of a window of so many steps, each how-manieth is timed; at least one is."""
    return max(1, steps // TIMED_STEPS)


def agree_to_stop(group: Group, stop_reason: str, done: int = 1, seconds: float = WINDOW_S) -> tuple[str, int]:
    """A window without steps: whether somebody wants to stop, and how many more pieces of work make the next window.

    `done` pieces took this rank `seconds`; rank 0's figure counts. Before the first step, and in evaluations.
    """
    row = torch.tensor([encode_reason(stop_reason), _next_length(done, seconds)], device=group.device)
    rows = gather_rows(group, row).tolist()
    return decode_reason(max(row[0] for row in rows)), rows[0][1]


def _next_length(done: int, seconds: float) -> int:
    """How many steps fill a window, if `done` of them took `seconds`; it grows at most eightfold."""
    return min(max(1, int(done * WINDOW_S / max(seconds, 1e-9))), 8 * done, MAX_WINDOW_STEPS)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held: on a GPU torch's peak allocation, on the CPU the process's peak RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _own_ms(results: Sequence[StepResult]) -> float:
    """This rank's own time in a step, ms: the median, as a step that the system held up says nothing."""
    timed = [compute_ms(result.compute_time) for result in results if result.compute_time]
    return statistics.median(timed) if timed else 0.0  # a world of one


def _means_of_shards(results: Sequence[StepResult]) -> list[float]:
    """Each step's loss, where logical shards were added up: the same on all ranks, at any number of them."""
    sums = [result.global_sums for result in results if result.global_sums is not None]
    return [total / weight if weight else math.nan for total, weight in torch.stack(sums).tolist()] if sums else []


def _gradient_sums(results: Sequence[StepResult]) -> torch.Tensor:
    """Each step's gradient sums added up, float64 (steps,), in three operations for the whole window."""
    parts = torch.stack([part for result in results for part in result.gradient_sums]).double()
    owners = [index for index, result in enumerate(results) for _ in result.gradient_sums]
    sums = parts.new_zeros(len(results))
    return sums.index_add_(0, torch.tensor(owners, device=parts.device), parts)


def _grad_norms(results: Sequence[StepResult]) -> torch.Tensor:
    """Each step's gradient norm, float64 (steps,), 0 where it was not measured."""
    norms = torch.zeros(len(results), dtype=torch.float64, device=results[0].loss_sum.device)
    measured = [index for index, result in enumerate(results) if result.grad_norm is not None]
    if measured:
        found = torch.stack([result.grad_norm for result in results if result.grad_norm is not None])
        norms[measured] = found.double()
    return norms


def _first_failure(
    steps: Sequence[int],
    sums: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    gradients: Sequence[Sequence[float]],
    norms: Sequence[Sequence[float]],
) -> tuple[int, str | None]:
    """How many steps come before the first that is not finite, and what is said of that one."""
    for index, step in enumerate(steps):
        if sum(weights[index]) == 0:
            return index, f"the loss's weights add up to 0 at step {step}: every sample is of a class with weight 0"
        for name, values in (("loss", sums[index]), ("gradient", gradients[index]), ("gradient norm", norms[index])):
            for rank, value in enumerate(values):
                if not math.isfinite(value):
                    return index, (
                        f"{name} is {value} at step {step} on rank {rank}; nothing was written from it: "
                        "try a smaller --optim.lr, --optim.max-grad-norm 1, or look for bad samples in the data"
                    )
    return len(steps), None
