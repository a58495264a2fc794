"""After an attempt: which rank failed first, and whether another attempt may help."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.errors import DesyncError, NonFiniteError, StorageError, names_lost_peer
from fnet_dist.run.attempt import Attempt, count_stalled_attempts
from fnet_dist.run.failure import (
    MEANINGS,
    REPLAYED,
    AttemptFailure,
    RankFailure,
    cause_of_hang,
    first_failure,
    is_repeated,
    read_failure,
    read_failures,
    silent_ranks,
)
from fnet_dist.run.log import LOGGER
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.stop import is_final, stop_reason
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import LOOK_EVERY_S
from jobs.launcher.workers import Worker, Workers

LOG_LINES = 60  # of a failed rank's log: more than a traceback of torch


def find_first_failure(attempt: Attempt, ended: list[Worker]) -> RankFailure | None:
    """Return the failure of the rank of this node that failed first; None if none did."""
    return first_failure(_failure_of(attempt, each) for each in ended if each.has_failed and not each.ended_by_us)


def find_cause_of_hang(attempt: Attempt, failure: RankFailure, node_spec: NodeSpec, patience_s: float) -> RankFailure:
    """Return the failure of the rank that the others wait for, or `failure`, of a rank of this node that hangs.

    Wait up to `patience_s` for the reports of other nodes' ranks: their watchdogs do not end at the same moment.
    """
    began, here = time.monotonic(), len(node_spec.ranks)
    while len(failures := read_failures(attempt)) < node_spec.world_size:
        if time.monotonic() - began > (patience_s if here < node_spec.world_size else 0):
            break
        time.sleep(LOOK_EVERY_S)
    return cause_of_hang(failures, node_spec.world_size) or replace(failure, ranks_at_fault=())


def _failure_of(attempt: Attempt, worker: Worker) -> RankFailure:
    """Return why a rank failed: by its exit code, and by its error file, which it has no time for when it is killed."""
    rank, code = worker.rank, worker.process.returncode
    written = read_failure(attempt.error(rank))
    if code < 0:
        name = signal.Signals(-code).name
        why = " (by the kernel, for memory? see dmesg)" if name == "SIGKILL" else ""
        aftermath = written is not None and written.aftermath
        if written is None and name == "SIGABRT" and names_lost_peer(_end_of_log(attempt, rank)):
            # NCCL's watchdog thread aborts the ranks that are left: they can write no error file.
            why, aftermath = ", as it lost the connection to another rank", True
        # Before all that have an error file: the loss of this rank may be the error there, in words we do not know.
        return RankFailure(rank, "crash", 1, f"was killed by {name}{why}", aftermath, ranks_at_fault=(rank,), time=-1)
    if written is None:
        known = code if is_final("crash", code) or code == StorageError.exit_code else 1
        text = f"ended with exit code {code} and without an error message"
        return RankFailure(rank, "crash", known, text, ranks_at_fault=(rank,))
    return replace(written, exit_code=code)


def report_failure(attempt: Attempt, failure: RankFailure | None) -> None:
    """Name the rank that failed first, with the end of its log; what rank 0 printed is on the screen already.

    Write the error file of one that was killed: for `status`, and for node 0, whose rank waits in the rendezvous until
    all ranks are there and cannot notice the loss itself.
    """
    if failure is None:
        return
    if not attempt.error(failure.rank).exists():
        with suppress(OSError):  # a full disk
            launch_env = LaunchEnv(failure.rank, error_file=attempt.error(failure.rank))
            write_error_file(launch_env, failure.message, "", failure.reason, aftermath=failure.aftermath)
    if failure.reason in REPLAYED:  # all ranks raise it, and the first of each node prints it
        return
    log = _end_of_log(attempt, failure.rank)
    if failure.rank != 0 and log:
        LOGGER.info(f"the end of {attempt.log(failure.rank)}:\n{log}")
    if failure.rank != 0 or failure.message not in log:
        which = "" if failure.reason == "hang" else f"rank {failure.rank} failed first: "
        LOGGER.error(f"attempt {attempt.number}: {which}{failure.message}")


def _end_of_log(attempt: Attempt, rank: int) -> str:
    with suppress(FileNotFoundError):
        return "\n".join(attempt.log(rank).read_text(errors="replace").splitlines()[-LOG_LINES:])
    return ""


@dataclass(frozen=True)
class RestartDecision:
    """The run's state after an attempt, as in outcome.json. `restarts` if another attempt follows; `message` is for
    people, and `cause` says which rank failed and why."""

    status: str
    reason: str
    exit_code: int
    step: int
    restarts: bool = False
    message: str = ""
    cause: str = ""


def find_cause(attempt: Attempt, failure: RankFailure | None) -> RankFailure | None:
    """Return the failure of the rank that failed first, on any node; `failure` is the first on this one.

    That of a rank of this node that was killed is in no error file.
    """
    if failure is not None and failure.reason == "hang":  # find_cause_of_hang has looked at all nodes
        return failure
    return first_failure(each for each in (failure, *read_failures(attempt)) if each is not None)


def describe_cause(cause: RankFailure | None) -> str:
    """Return which rank failed first and why; "" if none did."""
    if cause is None:
        return ""
    if cause.reason in ("hang", *REPLAYED) or cause.message.startswith("rank "):
        return cause.message
    return f"rank {cause.rank}: {cause.message}"


def describe_failure(attempt: Attempt, cause: RankFailure | None, node_spec: NodeSpec) -> AttemptFailure | None:
    """Return what end.json is to say of `cause`, the failure of the rank that failed first; None if none did."""
    if cause is None:
        return None
    ranks = cause.ranks_at_fault
    if cause.aftermath:  # others lost the connection to ranks that wrote nothing
        ranks = tuple(silent_ranks(read_failures(attempt), node_spec.world_size))
    nodes = {*map(node_spec.node_of, ranks)} or {*node_spec.nodes}
    rank, node = ranks[0] if len(ranks) == 1 else None, nodes.pop() if len(nodes) == 1 else None
    step = cause.step
    if step is not None and cause.reason != DesyncError.reason:  # an exception in training comes after its last step
        step += 1
    return AttemptFailure(cause.reason, describe_cause(cause), rank, node, step)


def decide_restart(
    attempt: Attempt, failure: RankFailure | None, workers: Workers, parallel: ParallelConfig
) -> RestartDecision:
    """Decide what follows `attempt`, whose ranks have ended; `workers` knows whether a stop was asked for. Rank 0's
    outcome.json counts where rank 0 finished or stopped; otherwise the first `failure` on this node does."""
    run, outcome = attempt.run, read_outcome(attempt.run)
    if outcome is not None and outcome["status"] != "failed":  # a later failure, as in cleanup, changes nothing
        return RestartDecision(outcome["status"], outcome["reason"], outcome["exit_code"], outcome["step"])
    step = newest_step(run)
    reason, code = ("crash", 1) if outcome is None else (outcome["reason"], outcome["exit_code"])
    if failure is not None and not stop_reason(reason).final:
        reason, code = failure.reason, failure.exit_code
    if is_final(reason, code) or (reason == NonFiniteError.reason and not parallel.replay_on_failure):
        return RestartDecision("failed", reason, code, step)
    if workers.stop_signal:
        where = f"the last checkpoint is of step {step:,}" if step else "there is no checkpoint yet"
        message = f"not restarted, as {workers.stop_signal} asked for a stop; {where}"
        if reason == StorageError.reason:  # the checkpoint that the stop asked for is not on disk
            return RestartDecision("failed", reason, code, step, message=message)
        exit_code = stop_reason(workers.stop_reason).exit_code
        return RestartDecision("stopped", workers.stop_reason, exit_code, step, message=message)
    if parallel.max_restarts == 0:  # no "given up": no restart was wanted
        return RestartDecision("failed", reason, code, step)
    cause = find_cause(attempt, failure)
    if cause is not None and is_repeated(attempt, cause, step):
        where = "before the next checkpoint" if cause.reason == DesyncError.reason else "after the same step"
        message = f"the same error as in attempt {attempt.number - 1}, {where}: {MEANINGS[cause.reason]}"
        return RestartDecision("failed", reason, code, step, message=message)
    stalled = count_stalled_attempts(run, step)
    if stalled >= parallel.max_restarts:
        message = (
            f"{stalled} attempts in a row without a new checkpoint, given up (parallel.max_restarts is "
            f"{parallel.max_restarts}); the logs are in {run.logs}"
        )
        return RestartDecision("failed", "no_progress", code, step, message=message)
    return RestartDecision("failed", reason, code, step, restarts=True)
