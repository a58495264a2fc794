"""Read why a rank failed from its error file, and find the rank that failed first."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fnet_dist.errors import DesyncError
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.stop import stop_reason

REPLAYED = ("non_finite", "desync")  # the next attempt tells if the machine was the cause: it repeats the steps
MEANINGS = {  # of an error that comes again when the steps are repeated
    "crash": "not tried again",
    "non_finite": "the data or the settings are the cause, not the machine",
    "desync": "the code gives ranks different weights, or that rank's machine computes wrong values each time",
}


@dataclass(frozen=True)
class RankFailure:
    """The failure of a rank, as its error file tells it."""

    rank: int
    reason: str  # as in outcome.json
    exit_code: int
    message: str
    aftermath: bool = field(default=False, compare=False)  # it only lost its connection to another rank
    step: int | None = field(default=None, compare=False)  # the last one before an exception in training
    ranks_at_fault: tuple[int, ...] = field(default=(), compare=False)  # empty if not known
    waits: Mapping[str, Any] | None = field(default=None, compare=False)  # of a hang, see flight_recorder.py
    time: int = field(default=0, compare=False)  # Unix time in whole seconds, as torchrun writes it: ranks often tie


@dataclass(frozen=True)
class AttemptFailure:
    """The failure of an attempt, as the launcher writes it to end.json."""

    reason: str
    message: str
    rank: int | None  # at fault; None if not known, or if several are
    node: str | None  # of the ranks at fault, by its name in Slurm; None outside of a job
    step: int | None  # the one that failed, or the one after which weights differed; None before the first


def read_attempt_failure(attempt: Attempt) -> AttemptFailure | None:
    """Return what end.json of `attempt` says of its failure; None if a launcher wrote nothing of one."""
    written = (attempt.read_end() or {}).get("failure")
    with suppress(TypeError):  # another version's
        return None if written is None else AttemptFailure(**written)
    return None


def read_failure(path: Path) -> RankFailure | None:
    """Return the content of rank_N.error, with exit code 1, which is not in it; None if there is none to be read."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # half written, or another version's
        content, rank = json.loads(path.read_text(encoding="utf-8")), int(path.stem.partition("_")[2])
        message, seconds = content["message"]["message"], int(content["message"]["extraInfo"]["timestamp"])
        at_fault = content.get("rank_at_fault", rank)
        return RankFailure(
            rank,
            content["reason"],
            1,
            str(message),
            content["aftermath"],
            content.get("step"),
            () if at_fault is None else (int(at_fault),),
            content.get("waits"),
            seconds,
        )
    return None


def read_failures(attempt: Attempt) -> list[RankFailure]:
    """Return the failures of all ranks of `attempt`, on every node; a stop that was asked for is none."""
    found = map(read_failure, attempt.begin.parent.glob("rank_*.error"))
    return [failure for failure in found if failure is not None and stop_reason(failure.reason).status != "stopped"]


def first_failure(failures: Iterable[RankFailure]) -> RankFailure | None:
    """Return the earliest failure; one that only followed from another counts last. None if there are none."""
    return min(failures, key=lambda failure: (failure.aftermath, failure.time, failure.rank), default=None)


def cause_of_hang(failures: Sequence[RankFailure], world_size: int) -> RankFailure | None:
    """Return the failure of the rank that all others wait for; None if no rank hangs, or one explains itself otherwise.

    That is a rank that wrote nothing (it is suspended, or stuck in a call), or the one that has begun fewer exchanges.
    """
    hung = {failure.rank: failure for failure in failures if failure.reason == "hang"}
    if not hung or any(failure.rank not in hung and not failure.aftermath for failure in failures):
        return None
    if known := [failure for failure in hung.values() if failure.waits is None]:  # a launcher has found it before
        return min(known, key=lambda failure: failure.rank)
    first = min(hung.values(), key=lambda failure: failure.rank)
    if silent := [rank for rank in range(world_size) if rank not in {failure.rank for failure in failures}]:
        why = "suspended, or stuck in a call that locks Python"
        text = f"rank {silent[0]} shows no life: {why}; {_ranks(sorted(hung))} for it ({first.message})"
        return RankFailure(silent[0], "hang", 1, text, ranks_at_fault=tuple(silent))
    begun = {rank: failure.waits["begun"] for rank, failure in hung.items() if failure.waits is not None}
    least = min(begun, key=lambda rank: (begun[rank], rank))
    if begun[least] == max(begun.values()):
        last = (first.waits or {}).get("last") or "shared memory"
        text = f"{first.message}; all ranks wait in the same exchange ({last}): look at the network between nodes"
        return replace(first, message=text, ranks_at_fault=())
    waiting = sorted(rank for rank in begun if begun[rank] > begun[least])
    return replace(hung[least], message=f"{hung[least].message}; {_ranks(waiting)} for it")


def _ranks(ranks: Sequence[int]) -> str:
    """Return "rank 3 waits", or "ranks 0, 1 wait"."""
    shown = ", ".join(map(str, ranks[:8])) + " ..." * (len(ranks) > 8)
    return f"rank {shown} waits" if len(ranks) == 1 else f"ranks {shown} wait"


def silent_ranks(failures: Iterable[RankFailure], world_size: int) -> list[int]:
    """Return the ranks that wrote nothing, where all others only lost their connection to one: they were killed."""
    written = {failure.rank: failure.aftermath for failure in failures}
    return [rank for rank in range(world_size) if rank not in written] if written and all(written.values()) else []


def is_repeated(attempt: Attempt, now: RankFailure, committed_step: int) -> bool:
    """Return True if `attempt` failed, by `now`, with the error of the attempt before, after the same step.

    Weights that differ are found at the next comparison, which need not come at the same step. They count as the same
    error if no checkpoint was saved at the step of the first comparison or later; `committed_step` is the newest one's.
    """
    before = first_failure(read_failures(Attempt(attempt.run, attempt.number - 1)))
    if before is None or now.reason not in ("crash", *REPLAYED):
        return False
    # A rank that was killed has no step, nor has a start that failed, perhaps for the network: trying again may help.
    # So it may if all that is known is a lost connection, as after the loss of a node.
    if now.step is None or now.aftermath:
        return False
    if now.reason == before.reason == DesyncError.reason:
        return committed_step < (before.step or 0)
    if now.reason in REPLAYED:  # a message may say NaN once, and infinity the next time
        return (now.reason, now.step) == (before.reason, before.step)
    return (now.step, now.message) == (before.step, before.message)
