"""Read why a rank failed from its error file, and find the rank that failed first."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fnet_dist.run.attempt import Attempt
from fnet_dist.run.stop import stop_reason


@dataclass(frozen=True)
class RankFailure:
    """The failure of a rank, as its error file tells it."""

    rank: int
    reason: str  # as in outcome.json
    exit_code: int
    message: str
    aftermath: bool = field(default=False, compare=False)  # it only lost its connection to another rank
    step: int | None = field(default=None, compare=False)  # the last one before an exception in training
    time: int = field(default=0, compare=False)  # Unix time in whole seconds, as torchrun writes it: ranks often tie


def read_failure(path: Path) -> RankFailure | None:
    """Return the content of rank_N.error, with exit code 1, which is not in it; None if there is none to be read."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # half written, or another version's
        content, rank = json.loads(path.read_text(encoding="utf-8")), int(path.stem.partition("_")[2])
        message, seconds = content["message"]["message"], int(content["message"]["extraInfo"]["timestamp"])
        return RankFailure(rank, content["reason"], 1, str(message), content["aftermath"], content.get("step"), seconds)
    return None


def read_failures(attempt: Attempt) -> list[RankFailure]:
    """Return the failures of all ranks of `attempt`, on every node; a stop that was asked for is none."""
    found = map(read_failure, attempt.begin.parent.glob("rank_*.error"))
    return [failure for failure in found if failure is not None and stop_reason(failure.reason).status != "stopped"]


def first_failure(failures: Iterable[RankFailure]) -> RankFailure | None:
    """Return the earliest failure; one that only followed from another counts last. None if there are none."""
    return min(failures, key=lambda failure: (failure.aftermath, failure.time, failure.rank), default=None)


def silent_ranks(failures: Iterable[RankFailure], world_size: int) -> list[int]:
    """Return the ranks that wrote nothing, where all others only lost their connection to one: they were killed."""
    written = {failure.rank: failure.aftermath for failure in failures}
    return [rank for rank in range(world_size) if rank not in written] if written and all(written.values()) else []


def is_repeated(attempt: Attempt, failure: RankFailure | None) -> bool:
    """Return True if `attempt` failed with the exception of the attempt before, after the same step.

    `failure` is the first on this node: that of a rank that was killed, which counts first, is in no error file.
    """
    now = first_failure(each for each in (failure, *read_failures(attempt)) if each is not None)
    before = first_failure(read_failures(Attempt(attempt.run, attempt.number - 1)))
    if now is None or before is None or now.reason != "crash":
        return False
    # A rank that was killed has no step, nor has a start that failed, perhaps for the network: trying again may help.
    # So it may if all that is known is a lost connection, as after the loss of a node.
    if now.step is None or now.aftermath:
        return False
    return (now.step, now.message) == (before.step, before.message)
