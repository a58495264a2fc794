"""Requeue the Slurm job after the last attempt in this allocation, if the run is to go on in another one.

Node 0 asks Slurm for a requeue only after signal_usr2 (sent by Slurm before the time limit, or by a user) or the
deadline, and only when the checkpoint is committed; after a SIGTERM Slurm decides. submitit's own requeue is not used:
its counter takes any warning in a job of ten minutes or less for a time-out and ends the job after three.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.config.schema import Config
from fnet_dist.errors import DesyncError
from fnet_dist.run.attempt import Attempt, count_stalled_attempts, last_attempt, list_attempts
from fnet_dist.run.failure import AttemptFailure
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, write_json
from fnet_dist.run.stop import stop_reason
from jobs.launcher.bad_nodes import failures_by_bad_node, nodes_to_exclude
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.notifier import NOTICE_S, Notifier
from jobs.launcher.restart_policy import RestartDecision
from jobs.launcher.workers import Workers
from jobs.text import describe_nodes
from slurm import client
from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.job_env import Allocation

PATIENCE_S = 600.0  # while slurmctld does not answer; it ends no job meanwhile
REFUSED_S = 10.0  # while slurmctld refuses: a job by salloc, for example, cannot be requeued
EXCLUDE_S = 20.0  # after the requeue; Slurm kills this task after KillWait, 30 s by default
PAUSE_S = 1.0  # slurmctld serves all users: no burst of requests


def requeue_if_needed(
    allocation: Allocation,
    run: RunDir,
    config: Config,
    decision: RestartDecision,
    workers: Workers,
    notifier: Notifier,
    ask: Callable[[str], str | None] | None = None,
) -> int:
    """Ask Slurm for a requeue where the run is to go on; return the exit code of node 0's task, which is the job's.

    Notices are sent before, as Slurm ends this task soon after: in a part of the time that its warning leaves. `ask`
    takes the place of ask_slurm.
    """
    next_in_slurm = stop_reason(decision.reason).slurm
    ask = ask or partial(ask_slurm, allocation, workers)
    if next_in_slurm == "requeue":
        is_preempted = _is_preempted(allocation)
        if is_preempted:
            _note_preemption(run, allocation)
        refusal = None if is_preempted else requeue_refusal(allocation, run, config)
        if refusal is None:
            bad = failures_by_bad_node(run, config, allocation.job_id)
            names = nodes_to_exclude(allocation, [*bad])
            for name in names:
                notifier.add_excluded(name, decision, describe_nodes({name: bad[name]}))
            notifier.add("requeued", decision)
            notifier.send(decision, min(NOTICE_S, config.resources.warning_s / 4))
            refusal = ask(next_in_slurm)
            if refusal is None and names:
                _exclude(allocation, names)
        if refusal is not None:
            LOGGER.error(f"not queued again: {refusal}")
            notifier.add("stopped", decision, f"not queued again: {refusal}")
            notifier.send(decision)
    elif next_in_slurm == "wait":
        LOGGER.info("after SIGTERM Slurm decides if the job starts again; if not, run the same command to resume")
        notifier.send(decision)
        ask(next_in_slurm)
    else:
        if decision.status == "stopped":
            LOGGER.info("the job ends here, as requested; run the same command to resume")
        notifier.send(decision)
    return decision.exit_code


def requeue_instead(
    decision: RestartDecision, node_spec: NodeSpec, attempt: Attempt, config: Config, failure: AttemptFailure | None
) -> RestartDecision:
    """Return `decision`, or that to ask Slurm for another allocation if a node of this one has failed too often.

    `failure` is that of `attempt`, which has just ended.
    """
    job, run = node_spec.allocation, attempt.run
    if job is None or failure is None or node_spec.ask_slurm is not None:  # other runs of the task go on here
        return decision
    # A desync that came again in the same place ends the run, but on another node it may not come.
    may_help = decision.restarts or (failure.reason == DesyncError.reason and config.parallel.max_restarts > 0)
    if not may_help:
        return decision
    bad = failures_by_bad_node(run, config, job.job_id, (attempt, failure))
    here = [node for node in bad if node in node_spec.nodes]
    if here and (refusal := requeue_refusal(job, run, config, coming=1)):
        LOGGER.warning(f"{', '.join(here)} not excluded: {refusal}")
    elif names := nodes_to_exclude(job, here):
        message = f"the job asks for another allocation, without {describe_nodes({name: bad[name] for name in names})}"
        return replace(decision, reason="bad_node", exit_code=75, restarts=False, message=message)
    return decision


def ask_slurm(allocation: Allocation, workers: Workers, next_in_slurm: str) -> str | None:
    """Ask for a requeue ("requeue"), or wait for Slurm's own decision ("wait"); return why there is no requeue."""
    if next_in_slurm == "requeue":
        return _requeue(allocation, workers)
    while _is_preempted(allocation):  # with a grace time: Slurm does not requeue a job that ends by itself in it
        time.sleep(PAUSE_S)
    return None


def requeue_refusal(allocation: Allocation, run: RunDir, config: Config, coming: int = 0) -> str | None:
    """Return why the job must not be requeued; None if it may. `coming` requeues are in no end.json yet."""
    limit, max_stalled = config.resources.max_requeues, config.parallel.max_restarts
    own = [each for each in list_attempts(run) if each.read_begin()["slurm_job_id"] == allocation.job_id]
    ends = [end for each in own if (end := each.read_end()) is not None]  # Slurm killed an attempt without one
    counted = [end for end in ends if stop_reason(end["reason"]).slurm == "requeue" and not end.get("preempted")]
    if coming + len(counted) > limit:
        return f"it has been queued again {limit} times (resources.max_requeues); run the same command to resume"
    step = newest_step(run)
    stalled = count_stalled_attempts(run, step, count_requeues=True)
    if 0 < max_stalled <= stalled:
        return f"{stalled} attempts in a row have saved nothing new (parallel.max_restarts); see {run.logs}"
    return None


def _requeue(allocation: Allocation, workers: Workers) -> str | None:
    """Ask Slurm to requeue the job until it ends this allocation; return why it does not, None if it does.

    The request is repeated: a slurmctld that is killed forgets what it accepted in the last seconds. This task has to
    stay until then, as its own end would end the job.
    """
    began, refused_at, accepted, printed = time.monotonic(), math.inf, False, ""
    while not (accepted and workers.stop_signal == "SIGTERM"):
        error = "Slurm has accepted the requeue, but has not ended this allocation"
        try:
            client.requeue(allocation.raw_job_id, allocation.restart_count)
            if not accepted:
                LOGGER.info(f"queued again: job {allocation.job_id} goes on in another allocation")
            accepted, refused_at = True, math.inf
        except EndingError as cancelled:
            return str(cancelled)
        except SlurmError as refused:
            error = str(refused)
            refused_at = math.inf if isinstance(refused, NoAnswerError) else min(refused_at, time.monotonic())
            if error != printed:
                LOGGER.warning(f"Slurm does not requeue the job yet: {error}")
            printed = error
        if time.monotonic() - began > PATIENCE_S or time.monotonic() - refused_at > REFUSED_S:
            return f"{error}; run the same command to resume"
        time.sleep(PAUSE_S)
    return None


def _exclude(allocation: Allocation, names: Sequence[str]) -> None:
    """Exclude these nodes from the job's next allocation. Slurm takes that only once it ends this one."""
    began = time.monotonic()
    while True:
        try:
            client.exclude_nodes(allocation.raw_job_id, names)
        except SlurmError as error:
            if time.monotonic() - began > EXCLUDE_S:
                LOGGER.error(f"the next allocation may have {', '.join(names)} again: {error}")
                return
            time.sleep(PAUSE_S)
        else:
            LOGGER.info(f"the next allocation excludes {', '.join(names)}")
            return


def _note_preemption(run: RunDir, allocation: Allocation) -> None:
    """Write to end.json that Slurm warned of a preemption (preempt_send_user_signal): max_requeues ignores it."""
    if (last := last_attempt(run)) is None or (end := last.read_end()) is None:
        return
    begin, start = last.read_begin(), (allocation.job_id, allocation.restart_count)
    if (begin["slurm_job_id"], begin["slurm_restart_count"]) == start:  # else this allocation had no attempt
        write_json(last.end, {**end, "preempted": True})


def _is_preempted(allocation: Allocation) -> bool:
    """Return True if the job runs in the grace time of a preemption; False also if Slurm does not answer."""
    try:
        shown = client.show_job(allocation.raw_job_id)
    except SlurmError as error:
        LOGGER.warning(f"Slurm does not say whether it preempts the job: {error}")
        return False
    return shown is not None and shown.state == "RUNNING" and shown.preempted is not None
