"""What to make of an attempt's end: which rank failed first, and whether another attempt may help."""

import json
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.errors import StorageError
from fnet_dist.run.attempt import Attempt, count_stalled_attempts
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import write_json
from fnet_dist.run.stop import STOPPED_EXIT_CODES, is_final, stop_reason
from jobs.launcher.workers import Worker, Workers, last_lines, say


@dataclass(frozen=True)
class RankFailure:
    """Why an attempt failed: the first rank to fail, the outcome's `reason` for it, and what the rank said."""

    rank: int
    reason: str
    exit_code: int
    message: str


def find_first_failure(attempt: Attempt, ended: list[Worker]) -> RankFailure | None:
    """The rank that failed first; None if none did. Whoever only lost another one is named last."""
    told = {rank.rank: _told(attempt.error(rank.rank)) for rank in ended}
    expected = (0, *STOPPED_EXIT_CODES)
    failed = [rank for rank in ended if rank.process.returncode not in expected and not rank.ended_by_us]

    def weight(rank: Worker) -> tuple[bool, bool, int]:
        said = told[rank.rank]
        when = int(said["message"]["extraInfo"]["timestamp"]) if said else 0
        return bool(said and said["aftermath"]), rank.process.returncode > 0, when

    if not failed:
        return None
    first = min(failed, key=weight)
    said, code = told[first.rank], first.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        why = " (by the kernel, for memory? see dmesg)" if name == "SIGKILL" else ""
        return RankFailure(first.rank, "crash", 1, f"was killed by {name}{why}")
    if said is None:
        known = code if is_final("crash", code) or code == StorageError.exit_code else 1
        return RankFailure(first.rank, "crash", known, f"ended with exit code {code} and said nothing")
    return RankFailure(first.rank, said["reason"], code, str(said["message"]["message"]))


def failed_elsewhere(attempt: Attempt, own: Collection[int]) -> str | None:
    """What is known of a rank that has failed on another node; None if none has. `own` are this node's ranks."""
    for path in attempt.begin.parent.glob("rank_*.error"):
        rank, said = int(path.stem.partition("_")[2]), _told(path)
        if rank not in own and said is not None and stop_reason(said["reason"]).status != "stopped":
            return f"rank {rank}, on another node, failed: {said['message']['message']}"
    return None


def report_failure(attempt: Attempt, cause: RankFailure | None) -> None:
    """Name the rank that failed first, with the end of its log; what rank 0 said is on the screen already.

    For one that was killed, leave the error file that it could not write: for `status`, and for node 0, where until
    all have met nobody would notice.
    """
    if cause is None:
        return
    if not attempt.error(cause.rank).exists():
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        told = {"message": {"message": cause.message, "extraInfo": extra}, "reason": cause.reason, "aftermath": False}
        with suppress(OSError):  # a full disk
            write_json(attempt.error(cause.rank), told)
    log = last_lines(attempt.log(cause.rank))
    if cause.rank != 0 and log:
        say(f"the end of {attempt.log(cause.rank)}:\n{log}")
    if cause.rank != 0 or cause.message not in log:
        say(f"attempt {attempt.number}: rank {cause.rank} failed first: {cause.message}", sys.stderr)


@dataclass(frozen=True)
class RestartDecision:
    """How the run stands after an attempt; `restarts` says that another one follows. `words` are for people."""

    status: str
    reason: str
    exit_code: int
    step: int
    restarts: bool = False
    words: str = ""


def decide_restart(attempt: Attempt, cause: RankFailure | None, ranks: Workers, max_restarts: int) -> RestartDecision:
    """The verdict on `attempt`, whose ranks have ended; `ranks` knows whether a stop was asked for.

    Rank 0's outcome.json is the truth where it ended as it meant to; where it did not, `cause` knows better.
    """
    run, outcome = attempt.run, read_outcome(attempt.run)
    if outcome is not None and outcome["status"] != "failed":
        return RestartDecision(outcome["status"], outcome["reason"], outcome["exit_code"], outcome["step"])
    step = newest_step(run)
    reason, code = ("crash", 1) if outcome is None else (outcome["reason"], outcome["exit_code"])
    if cause is not None and not stop_reason(reason).final:
        reason, code = cause.reason, cause.exit_code
    if is_final(reason, code):
        return RestartDecision("failed", reason, code, step)
    if ranks.asked:
        where = f"the last checkpoint is of step {step:,}" if step else "there is no checkpoint yet"
        words = f"not restarted, as {ranks.asked} asked for a stop; {where}"
        if reason == StorageError.reason:  # what it was to save is lost
            return RestartDecision("failed", reason, code, step, words=words)
        return RestartDecision("stopped", ranks.reason, ranks.exit_code, step, words=words)
    if max_restarts == 0:
        return RestartDecision("failed", reason, code, step)
    stalled = count_stalled_attempts(run, step)
    if stalled >= max_restarts:
        words = (
            f"error: {stalled} attempts in a row without a new checkpoint, given up (parallel.max_restarts is "
            f"{max_restarts}); the logs are in {run.attempts}"
        )
        return RestartDecision("failed", "no_progress", code, step, words=words)
    return RestartDecision("failed", reason, code, step, restarts=True)


def _told(error_file: Path) -> dict[str, Any] | None:
    try:
        said: dict[str, Any] = json.loads(error_file.read_text())
    except (OSError, ValueError):
        return None
    return said
