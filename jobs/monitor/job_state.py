"""Combine what run directories and Slurm say: only Slurm knows of jobs that wait, and of jobs that were killed."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import STALE_S
from fnet_dist.run.run_dir import RunDir
from jobs.monitor.run_state import State, Status, read_state, read_status
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, RunJob, SlurmJob, SlurmSnapshot, ask, run_job_of
from slurm.types import TERMINAL_STATES, WAITING_STATES

WORDS = {"NODE_FAIL": "node failure", "COMPLETED": "gone"}  # other states: in lower case
NOT_BEGUN = "(not begun)"
NOT_LAUNCHED = "(not launched)"
# slurmstepd could not open the job's output file, and the job ended with 0:53. The word depends on Slurm's version.
_LAUNCH_FAILURES = ("JobLaunchFailure", "RaisedSignal:53")
RECENT_S = 5.0  # a heartbeat comes every second; one this recent spares a squeue


def read_statuses(
    runs: Sequence[RunDir], before: SlurmSnapshot = EMPTY_SNAPSHOT, starts: Sequence[str] = ()
) -> tuple[list[Status], SlurmSnapshot]:
    """Return the status of each run, and Slurm's answer.

    Slurm is asked if a run names a job that may be alive, or for the accounting records of the jobs `starts`.
    """
    # Slurm first, files second: an attempt that ends in between is then not taken for killed.
    jobs = [job for run in runs if (job := _run_job(run)) and not job.is_over]
    snapshot = ask([job.job_id for job in jobs], before, starts, {job.user for job in jobs})
    return [_status(run, snapshot) for run in runs], snapshot


def state_of(run: RunDir, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[State, RunJob | None, SlurmSnapshot]:
    """Return one run's state; Slurm is asked only if the run directory leaves it open."""
    run_job, snapshot = run_job_of(run), before
    if run_job is not None and not run_job.is_over:
        is_alive = run_job.restarts is not None and run_job.reason is None and time.time() - run_job.since < RECENT_S
        snapshot = before if is_alive else ask([run_job.job_id], before, users={run_job.user})
    run_job = run_job_of(run)  # again: the job may have begun an attempt while Slurm was asked
    state = read_state(run)
    return (state if run_job is None else merge_slurm_state(state, run_job, snapshot)), run_job, snapshot


def merge_slurm_state(state: State, run_job: RunJob, snapshot: SlurmSnapshot, *, resumes: bool = False) -> State:
    """Correct `state`, which was read from files, by what Slurm says of the run's newest job.

    `resumes` says that the run has recorded steps: its next attempt resumes, it does not start.
    """
    job, has_begun = snapshot.jobs.get(run_job.job_id), run_job.restarts is not None
    is_known = snapshot.knows(run_job.job_id)
    if run_job.is_over or (has_begun and not is_known):
        return replace(state, ended=state.ended and (run_job.is_over or not snapshot.unreachable))
    if not is_known:
        return State("submitted", ended=False)  # Slurm does not answer: the job may wait or run
    is_open = has_begun and run_job.reason is None and not run_job.is_cancelled
    if job is None and is_open and time.time() - run_job.since < STALE_S:
        return state  # its heartbeat outranks its absence from a list
    if job is None or job.state in TERMINAL_STATES:
        return _state_after_job(state, run_job, job)
    if run_job.restarts is not None and (job.restarts is None or run_job.restarts >= job.restarts):
        # The attempt of this allocation has begun. Even if it has ended, the job may still be requeued.
        return replace(state, ended=False)
    if job.state in WAITING_STATES or (has_begun and job.state == "COMPLETING"):  # not all of its nodes are free yet
        reason = f"({job.reason})" if job.reason else ""
        return State("requeued" if has_begun else "queued", reason, ended=False, for_s=time.time() - run_job.since)
    if job.state in ("RUNNING", "CONFIGURING"):
        return State("resuming" if resumes else "starting", ended=False)
    return State("ending" if job.state == "COMPLETING" else job.state.lower(), ended=False)


def waiting_message(run_job: RunJob, snapshot: SlurmSnapshot) -> str:
    """Return what a run without a living attempt waits for, as "queued: job 12 (Resources)"; "" if nothing."""
    job = snapshot.jobs.get(run_job.job_id)
    if job is None:
        return f"job {run_job.job_id}: {snapshot.note}" if snapshot.note else ""
    if job.state not in WAITING_STATES:
        return ""
    again = "" if run_job.restarts is None else " again"
    return f"queued{again}: job {job.job_id}" + (f" ({job.reason})" if job.reason else "")


def _state_after_job(state: State, run_job: RunJob, job: SlurmJob | None) -> State:
    """Return the state of a run whose job has left Slurm; `state` may not know that."""
    forgotten = "cancelled" if run_job.is_cancelled else "gone"
    word = forgotten if job is None else WORDS.get(job.state, job.state.lower().replace("_", " "))
    if run_job.restarts is None:  # a finished run may have been submitted again
        if state.word == "finished":
            return state  # of the earlier job, whose result stands
        is_launched = job is None or not (job.reason or "").startswith(_LAUNCH_FAILURES)
        return State(word, NOT_BEGUN if is_launched else NOT_LAUNCHED)
    if run_job.reason is None:
        return state if state.ended and state.word != "gone" else State(word)
    return state if word in ("gone", "failed") else State(word, f"({run_job.reason})")


def _status(run: RunDir, snapshot: SlurmSnapshot) -> Status:
    run_job = _run_job(run)  # first: an attempt that begins in between then belongs to the job that Slurm shows
    status = read_status(run)
    if status.is_unreadable or run_job is None:
        return status
    state = merge_slurm_state(status.state, run_job, snapshot, resumes=status.figures.train is not None)
    return replace(status, state=state, run_job=run_job, slurm_job=snapshot.jobs.get(run_job.job_id))


def _run_job(run: RunDir) -> RunJob | None:
    """Return run_job_of(run), or None for a run whose files cannot be read: read_status says so in its note."""
    with suppress(FnetError, AttributeError, LookupError, OSError, TypeError):
        return run_job_of(run)
    return None
