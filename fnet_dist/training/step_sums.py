"""Exchange what ranks measured in the steps of a window: gather it where ranks are few, reduce it where they are many.

Gathered, a window takes ranks x steps numbers on every rank: at 512 ranks, 200 us a step to look at them. Reduced, the
host's work and memory do not grow with ranks x steps. The sums do not depend on the order in which ranks are added,
which differs with the length of a window: the same steps give the same bits, also after a resume.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fnet_dist.distributed.process_group import Group, all_reduce, gather_rows
from fnet_dist.run.metrics_log import MAX_RANK_CURVES, mean_or_none
from fnet_dist.training.step import StepMetrics, weightless_message

_FRACTION = 2.0**48  # fixed-point numbers have 48 bits after the point: 32,768 of them add up without an overflow
_NONE = 2**62  # above every code of a bad step
_KINDS = ("nan", "inf", "-inf")
_QUANTITIES = ("loss", "gradient", "gradient norm")


class BadStep(NamedTuple):
    """The first step of a window that is not finite; `rank` is the only rank where it is not, None if several are."""

    step: int
    rank: int | None
    message: str


class StepSums(NamedTuple):
    """The steps of a window before the first that is not finite, the same on all ranks. Losses are means."""

    losses: list[float]  # of the global batch
    # Of each rank's local batch, None if that was empty; of a step whose ranks' losses were not sent, None.
    per_rank: list[tuple[float | None, ...] | None]
    extremes: list[tuple[float | None, float | None, int | None]]  # (lowest, highest, its rank) of such a step
    grad_norms: list[float]
    failure: BadStep | None


def local_columns(metrics: Sequence[StepMetrics], device: torch.device) -> Tensor:
    """Return loss sums, weights, gradient sums and gradient norms on this rank, (4, steps) float64."""
    count = len(metrics)
    parts, sizes = [part for each in metrics for part in each.gradient_sums], [len(m.gradient_sums) for m in metrics]
    sums = torch.stack(parts).double()
    if sizes[0] * count == len(parts):
        sums = sums.view(count, -1).sum(1)
    else:  # DDP rebuilds its buckets after the first step
        index = torch.arange(count, device=device).repeat_interleave(torch.tensor(sizes, device=device))
        sums = sums.new_zeros(count).index_add_(0, index, sums)
    weights = [each.weight for each in metrics]
    if all(isinstance(weight, float) for weight in weights):
        all_weights = torch.tensor(weights, dtype=torch.float64, device=device)
    else:
        all_weights = torch.stack([torch.as_tensor(weight, device=device).double() for weight in weights])
    norms = torch.zeros_like(sums)
    if measured := [index for index, each in enumerate(metrics) if each.grad_norm is not None]:
        found = torch.stack([norm for each in metrics if (norm := each.grad_norm) is not None])
        norms[torch.tensor(measured, device=device)] = found.double()
    return torch.stack([torch.stack([each.loss_sum for each in metrics]).double(), all_weights, sums, norms])


def sums_of_few(metrics: Sequence[StepMetrics], by_rank: Tensor) -> StepSums:
    """Return the sums of `by_rank`, (ranks, 4, steps): all ranks' local_columns, on the CPU."""
    measured = by_rank[:, [0, 2, 3]]
    weightless, is_bad = by_rank[:, 1].sum(0) == 0, ~measured.isfinite()
    failed = (weightless | is_bad.any(1).any(0)).nonzero().flatten().tolist()
    good, failure = len(metrics), None
    if failed:
        good, step = failed[0], metrics[failed[0]].step
        if weightless[good]:
            failure = BadStep(step, None, weightless_message(step))
        else:
            quantity, rank = is_bad[:, :, good].T.nonzero()[0].tolist()
            is_alone = int(is_bad[:, :2, good].any(1).sum()) == 1
            message = _describe(quantity, f"{measured[rank, quantity, good]}", step, rank)
            failure = BadStep(step, rank if is_alone else None, message)
    loss_sums, weights, _, norms = by_rank[:, :, :good].permute(1, 2, 0).tolist()
    if (totals := _shard_totals(metrics[:good])) is None:  # fsum is exact, so the order of ranks does not matter
        totals = [[math.fsum(losses), math.fsum(sizes)] for losses, sizes in zip(loss_sums, weights, strict=True)]
    return StepSums(
        [total / weight for total, weight in totals],
        [tuple(map(mean_or_none, losses, sizes)) for losses, sizes in zip(loss_sums, weights, strict=True)],
        [(None, None, None)] * good,
        [ranks[0] for ranks in norms],
        failure,
    )


def sums_of_many(group: Group, metrics: Sequence[StepMetrics], mine: Tensor, log_every_steps: int) -> StepSums:
    """Return the sums over all ranks of `mine`, this rank's local_columns. Three collectives, and one for the steps
    whose losses are sent by all ranks, a row of the tracker."""
    loss_sums, weights, _, norms = mine
    means = torch.where(weights == 0, torch.nan, loss_sums / weights)
    has_loss = means.isfinite()
    highest = torch.stack([means.where(has_loss, -torch.inf), (-means).where(has_loss, -torch.inf), norms])
    highest, negated_lowest, norms = all_reduce(group, highest.nan_to_num(nan=0.0, posinf=0.0), "max")
    ranks = torch.where(has_loss & (means == highest), group.rank, group.world_size).long()
    *worst, code = all_reduce(group, torch.cat([ranks, _first_bad(group, mine).view(1)]), "min").tolist()
    sums = _from_fixed(all_reduce(group, _to_fixed(mine[:2]), "sum"))
    weightless = (sums[1] == 0).nonzero().flatten().tolist()
    bad = code // (3 * group.world_size) // 3 if code < _NONE else len(metrics)
    good, failure = min([bad, *weightless]), None
    if good in weightless:
        failure = BadStep(metrics[good].step, None, weightless_message(metrics[good].step))
    elif good < len(metrics):
        place, kind = divmod(code, 3)
        rank, step = place % group.world_size, metrics[good].step
        is_bad = ~mine[[0, 2], good].isfinite().all()
        is_alone = all_reduce(group, is_bad.long().view(1), "sum").item() == 1
        message = _describe(place // group.world_size % 3, _KINDS[kind], step, rank)
        failure = BadStep(step, rank if is_alone else None, message)
    # Above a thousand ranks less often: their losses in the log would take longer than the steps between.
    every = log_every_steps * max(1, group.world_size // 1024)
    sent = [index for index, each in enumerate(metrics[:good]) if each.step % every == 0]
    per_rank: list[tuple[float | None, ...] | None] = [None] * good
    if sent:
        for index, losses in zip(sent, gather_rows(group, means[sent]).T.tolist(), strict=True):
            per_rank[index] = tuple(None if math.isnan(loss) else loss for loss in losses)
    shown = zip((-negated_lowest).tolist(), highest.tolist(), worst, strict=True)
    extremes = [extreme if extreme[2] < group.world_size else (None, None, None) for extreme in shown]
    totals = _shard_totals(metrics[:good]) or sums[:, :good].T.tolist()
    return StepSums(
        [total / weight for total, weight in totals],
        per_rank,
        [(None, None, None) if losses else extreme for losses, extreme in zip(per_rank, extremes[:good], strict=True)],
        norms[:good].tolist(),
        failure,
    )


def _shard_totals(metrics: Sequence[StepMetrics]) -> list[list[float]] | None:
    """Return [loss sum, weight] of each step where the tree of logical shards has added them up, else None.

    They have the same bits at any number of ranks.
    """
    found = [each.global_sums for each in metrics if each.global_sums is not None]
    return torch.stack(found).tolist() if found else None


def _first_bad(group: Group, mine: Tensor) -> Tensor:
    """Return the code of this rank's first value that is not finite: the lower, the earlier; _NONE if there is none."""
    values = mine[[0, 2, 3]].T.flatten()  # by step, then by quantity
    if not len(found := (~values.isfinite()).nonzero().flatten()[:1]):
        return torch.tensor(_NONE, device=mine.device)
    [value] = values[found]
    kind = torch.where(value.isnan(), 0, torch.where(value > 0, 1, 2))
    return (found[0] * group.world_size + group.rank) * 3 + kind


def _describe(quantity: int, value: str, step: int, rank: int) -> str:
    return (
        f"{_QUANTITIES[quantity]} is {value} at step {step} on rank {rank}; nothing was written from it: "
        "try a smaller --optim.lr, --optim.max-grad-norm 1, or look for bad samples in the data"
    )


def _to_fixed(numbers: Tensor) -> Tensor:
    """Return `numbers` (n, m) as fixed-point numbers (2, n, m) int64, whole part and fraction; 0 for NaN."""
    whole = numbers.nan_to_num(nan=0.0).clamp(-(2.0**47), 2.0**47).floor()
    fraction = (numbers - whole).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1) * _FRACTION
    return torch.stack([whole.long(), fraction.long()])


def _from_fixed(fixed: Tensor) -> Tensor:
    numbers: Tensor = fixed[0].double() + fixed[1].double() / _FRACTION
    return numbers


def are_few(group: Group) -> bool:
    """Return True if every step's line in the metrics log has the losses of all ranks."""
    return group.world_size <= MAX_RANK_CURVES
