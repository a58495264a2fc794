"""How runs stand by their directories and by Slurm, which knows of those that wait, and of those that were killed."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from fnet_dist.errors import FnetError
from fnet_dist.run.run_dir import RunDir
from jobs.monitor.run_state import State, Status, read_state, read_status
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, OVER, WAITING, Job, RunJob, SlurmSnapshot, ask, run_job_of

WORDS = {"NODE_FAIL": "node failure", "COMPLETED": "gone"}
NOT_BEGUN = "(not begun)"
QUIET_S = 5.0  # an owner shows life every second


def read_statuses(
    runs: Sequence[RunDir], before: SlurmSnapshot = EMPTY_SNAPSHOT, starts: Sequence[str] = ()
) -> tuple[list[Status], SlurmSnapshot]:
    """How `runs` stand, those that were active last first. Slurm is asked if one names a job that may be alive, or for
    the records of the jobs `starts`."""
    # Files are read after Slurm was asked: an end that comes in between is no death without a word.
    answers = ask([turn.job_id for run in runs if (turn := _turn(run)) and not turn.is_over], before, starts)
    return [_status(run, answers) for run in runs], answers


def state_of(run: RunDir, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[State, RunJob | None, SlurmSnapshot]:
    """How one run stands; Slurm is asked only where its directory leaves it open."""
    turn, answers = run_job_of(run), before
    if turn is not None and not turn.is_over and not _shows_life(turn):
        answers = ask([turn.job_id], before)
    turn = run_job_of(run)
    state = read_state(run)
    return (state if turn is None else in_slurm(state, turn, answers)), turn, answers


def in_slurm(state: State, turn: RunJob, answers: SlurmSnapshot, *, resumes: bool = False) -> State:
    """What becomes of `state`, read from files, by what Slurm says of the run's newest job."""
    job = answers.jobs.get(turn.job_id)
    if turn.is_over or (not answers.knows(turn.job_id) and turn.restarts is not None):
        return replace(state, ended=state.ended and (turn.is_over or not answers.silent))
    if not answers.knows(turn.job_id):
        return State("submitted", ended=False)
    if job is None or job.state in OVER:
        return _over(state, turn, job)
    if turn.restarts is not None and (job.restarts is None or turn.restarts >= job.restarts):
        return replace(state, ended=False)  # its attempt has begun; if that has ended, the job may be queued again
    again = turn.restarts is not None
    if job.state in WAITING or (again and job.state == "COMPLETING"):  # not all of its nodes are free yet
        why = f"({job.reason})" if job.reason else ""
        return State("requeued" if again else "queued", why, ended=False, for_s=time.time() - turn.since)
    if job.state in ("RUNNING", "CONFIGURING"):
        return State("resuming" if resumes else "starting", ended=False)
    return State("ending" if job.state == "COMPLETING" else job.state.lower(), ended=False)


def waiting(turn: RunJob, answers: SlurmSnapshot) -> str:
    """What a run waits for whose newest attempt is not there yet, or over: "queued: job 12 (Resources)"; or ""."""
    job = answers.jobs.get(turn.job_id)
    again = "" if turn.restarts is None else " again"
    if job is None:
        return f"job {turn.job_id}: {answers.note}" if answers.note else ""
    if job.state not in WAITING:
        return ""
    return f"queued{again}: job {job.job_id}" + (f" ({job.reason})" if job.reason else "")


def _over(state: State, turn: RunJob, job: Job | None) -> State:
    """The job has left Slurm; `state` may not know."""
    word = "gone" if job is None else WORDS.get(job.state, job.state.lower().replace("_", " "))
    if turn.restarts is None:  # a finished run may have been submitted again
        return state if state.word == "finished" else State(word, NOT_BEGUN)
    if turn.reason is None:
        return state if state.ended and state.word != "gone" else State(word)
    return state if word in ("gone", "failed") else State(word, f"({turn.reason})")


def _status(run: RunDir, answers: SlurmSnapshot) -> Status:
    turn = _turn(run)  # first: an attempt that begins in between is then as Slurm's job that runs
    status = read_status(run)
    if status.note or turn is None:
        return status
    state = in_slurm(status.state, turn, answers, resumes=status.figures.train is not None)
    return replace(status, state=state, turn=turn, job=answers.jobs.get(turn.job_id))


def _turn(run: RunDir) -> RunJob | None:
    """turn_of, or None for a run whose files cannot be read: its row says so."""
    with suppress(FnetError, AttributeError, LookupError, OSError, TypeError):
        return run_job_of(run)
    return None


def _shows_life(turn: RunJob) -> bool:
    """Whether the job's attempt is at work, by its directory: Slurm need not be asked."""
    return turn.restarts is not None and turn.reason is None and time.time() - turn.since < QUIET_S
