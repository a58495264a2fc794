"""What node 0 settles with Slurm once the run has ended, for now or for good.

Only for the reasons signal_usr2 (Slurm's warning, or a person's) and deadline it asks for another allocation: after a
TERM Slurm alone decides. Only when the checkpoint is committed, and never through submitit, whose own counter takes any
warning in a job of ten minutes or less for a time-out and ends the job after three.
"""

import math
import sys
import time

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.config.schema import Config
from fnet_dist.run.attempt import count_stalled_attempts, list_attempts
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import stop_reason
from jobs.launcher.restart_policy import RestartDecision
from jobs.launcher.workers import Workers, say
from slurm import client
from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.job_env import Allocation

PATIENCE_S = 600.0  # with a controller that is away; it ends no job meanwhile
REFUSED_S = 10.0  # with one that refuses: a job by salloc, say, is never queued again
PAUSE_S = 1.0


def requeue_or_exit(
    allocation: Allocation, run: RunDir, config: Config, decision: RestartDecision, ranks: Workers
) -> int:
    """The exit code of node 0's task, and with it of the job, unless Slurm ends it to start it again."""
    next_in_slurm = stop_reason(decision.reason).slurm
    if next_in_slurm == "requeue":
        # With preempt_send_user_signal Slurm warns of a preemption too: it is none of those that are counted.
        refusal = None if _is_preempted(allocation) else requeue_refusal(allocation, run, config)
        refusal = refusal or _requeue(allocation, ranks)
        if refusal is not None:
            say(f"error: not queued again: {refusal}", sys.stderr)
    elif next_in_slurm == "wait":
        say("after a TERM Slurm decides whether the job starts again; if it does not, the same command goes on")
        _wait_for_slurm(allocation)
    elif decision.status == "stopped":
        say("the job ends here, as asked; the same command goes on")
    return decision.exit_code


def requeue_refusal(allocation: Allocation, run: RunDir, config: Config) -> str | None:
    """Why the job is not to be queued again after a warning; None if it is."""
    limit, patience = config.resources.max_requeues, config.parallel.max_restarts
    warned = [
        attempt
        for attempt in list_attempts(run)
        if read_json(attempt.begin)["slurm_job_id"] == allocation.job_id
        and (end := read_json(attempt.end)) is not None
        and stop_reason(end["reason"]).slurm == "requeue"
    ]
    if len(warned) > limit:
        return f"it was {limit} times already (resources.max_requeues); the same command goes on"
    step = newest_step(run)
    in_vain = count_stalled_attempts(run, step, count_requeues=True)
    if 0 < patience <= in_vain:
        return f"{in_vain} attempts in a row have saved nothing new (parallel.max_restarts); see {run.attempts}"
    return None


def _requeue(allocation: Allocation, ranks: Workers) -> str | None:
    """Ask Slurm to start the job again, until it ends this allocation; why it does not, if so.

    A controller that dies has forgotten what it took in the last seconds: it is asked again. And a task that ended by
    itself meanwhile would end the job.
    """
    began, refused_at, taken, said = time.monotonic(), math.inf, False, ""
    while not (taken and ranks.asked == "SIGTERM"):
        error, refused_before, refused_at = "it does not end this allocation", refused_at, math.inf
        try:
            client.requeue(allocation.raw_job_id, allocation.restart_count)
            if not taken:
                say(f"queued again: job {allocation.job_id} goes on in another allocation")
            taken = True
        except EndingError as cancelled:
            return str(cancelled)
        except SlurmError as refused:
            error = str(refused)
            if not isinstance(refused, NoAnswerError):
                refused_at = min(refused_before, time.monotonic())
            if error != said:
                say(f"Slurm does not take it yet: {error}", sys.stderr)
            said = error
        if time.monotonic() - began > PATIENCE_S or time.monotonic() - refused_at > REFUSED_S:
            return f"{error}; the same command goes on"
        time.sleep(PAUSE_S)
    return None


def _wait_for_slurm(allocation: Allocation) -> None:
    """Stay while Slurm preempts the job with a grace time: a job that ended meanwhile would count as ended by itself,
    and not be started again. Who sent the TERM otherwise waits for nothing."""
    while _is_preempted(allocation):
        time.sleep(PAUSE_S)


def _is_preempted(allocation: Allocation) -> bool:
    """Whether the job runs in the grace time of a preemption, as far as Slurm says."""
    try:
        shown = client.show_job(allocation.raw_job_id)
    except SlurmError as error:
        say(f"Slurm does not say whether it preempts the job: {error}", sys.stderr)
        return False
    return shown is not None and shown.state == "RUNNING" and shown.preempted is not None
