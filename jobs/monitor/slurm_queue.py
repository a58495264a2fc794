"""Ask Slurm about the jobs of runs: one squeue for all, one sacct for those that slurmctld has forgotten."""

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import RunDir, mtime, read_json
from fnet_dist.run.stop import stop_reason
from slurm import client
from slurm.errors import SlurmError
from slurm.types import TERMINAL_STATES, WAITING_STATES, PastJob

ANSWER_S = 5.0  # time limit of squeue and sacct each: without slurmctld a table is shown all the same
ASK_EVERY_S = 10.0  # sites ask users not to call squeue in a tight loop: it locks slurmctld
MAX_JOBS = 100  # job ids in one sacct call, those of the runs that were active last


@dataclass(frozen=True)
class RunJob:
    """A run's newest Slurm job, as far as the run directory tells.

    `restarts` is Slurm's restart count at the job's last attempt, None before the first; `reason` says why that attempt
    ended, None without an end.json. `since` is the Unix time of the submission or, after the first attempt, of the last
    attempt's end or heartbeat.
    """

    job_id: str
    restarts: int | None
    reason: str | None
    since: float
    is_cancelled: bool = False  # by `fnet cancel`: Slurm itself forgets it
    user: int = field(default_factory=os.geteuid)  # Unix id of the job's user

    @property
    def is_over(self) -> bool:
        """True if the attempt's end is the job's end too: Slurm need not be asked."""
        return self.reason is not None and stop_reason(self.reason).slurm == "end"


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct (`told_by`) shows it; times are Unix seconds.

    `started` and `ends` are None while it waits, `expected` is the start that the scheduler estimates. `ends` is the
    end by the time limit, then the actual end. `status --json` prints these fields under these names.
    """

    job_id: str
    state: str
    reason: str | None
    node_list: str
    submitted: int | None
    started: int | None
    expected: int | None
    ends: int | None
    restarts: int | None
    told_by: str


@dataclass(frozen=True)
class SlurmSnapshot:
    """Slurm's answer about the jobs `asked`, at `time` on the monotonic clock.

    `jobs` leaves out those that Slurm does not know, `records` is what accounting was asked for. `note` says in one
    line why there is no answer, or none from accounting; `unreachable` means that there may be one later.
    """

    asked: frozenset[str] = frozenset()
    jobs: Mapping[str, SlurmJob] = field(default_factory=dict)
    note: str = ""
    unreachable: bool = False
    records: tuple[PastJob, ...] = ()
    time: float = 0.0
    answered: bool = True  # by slurmctld, whatever accounting said

    def knows(self, job_id: str) -> bool:
        """Return True if Slurm has answered about the job, be it only that it has forgotten it."""
        return job_id in self.jobs or (job_id in self.asked and self.answered)


EMPTY_SNAPSHOT = SlurmSnapshot()


def run_job_of(run: RunDir) -> RunJob | None:
    """Return the newest Slurm job of `run`; None if its last attempt, or a submission since, is not Slurm's."""
    submitted, last = read_json(run.job), last_attempt(run)
    if submitted is None and last is None:
        return None
    user = (run.job if last is None else last.begin).stat().st_uid
    begin: dict[str, Any] = {"slurm_job_id": None, "time": 0} if last is None else last.read_begin()
    job_id = begin["slurm_job_id"]
    if submitted is not None and submitted["id"] != job_id and submitted["time"] > (begin["time"] or 0):
        cancelled, on_slurm, user = "cancelled" in submitted, submitted["cluster"] == "slurm", run.job.stat().st_uid
        return RunJob(submitted["id"], None, None, submitted["time"], cancelled, user) if on_slurm else None
    if last is None or job_id is None:
        return None
    end, restarts = last.read_end(), begin["slurm_restart_count"]
    cancelled = submitted is not None and submitted["id"] == job_id and "cancelled" in submitted
    if end is None or end["restarts"]:
        return RunJob(job_id, restarts, None, mtime(last.heartbeat), cancelled, user)
    return RunJob(job_id, restarts, end["reason"], end["time"], cancelled, user)


def ask(
    job_ids: Sequence[str],
    before: SlurmSnapshot = EMPTY_SNAPSHOT,
    starts: Sequence[str] = (),
    users: Collection[int] = (),
) -> SlurmSnapshot:
    """Ask Slurm about `job_ids`, of this process's user and of `users`; and accounting about every start of `starts`.

    Return `before` itself while it is recent enough. Takes 2 x ANSWER_S at most and raises nothing: a failure is the
    snapshot's `note`.
    """
    asked = frozenset(job_ids) | frozenset(starts)  # in the snapshot: "unknown to Slurm" differs from "not asked"
    if not asked:
        return EMPTY_SNAPSHOT
    if asked <= before.asked and time.monotonic() - before.time < ASK_EVERY_S:  # monotonic: the wall clock may jump
        return before
    if shutil.which("squeue") is None:
        note = "Slurm's programs are not on the PATH; its jobs are shown as the run directories know them"
        return SlurmSnapshot(asked, note=note, time=time.monotonic(), answered=False)
    note, jobs, records = "", dict[str, SlurmJob](), list[PastJob]()
    try:
        for job in client.remembered(ANSWER_S, users):
            if job.job_id in asked:
                ends = None if job.state in WAITING_STATES else job.ends
                times = (job.submitted, job.started, job.expected_start, ends, job.restarts)
                jobs[job.job_id] = SlurmJob(job.job_id, job.state, job.reason, job.node_list, *times, told_by="squeue")
    except SlurmError as error:
        note = str(error)
    unreachable = bool(note)  # of slurmctld; a failure of accounting alone may be for good
    forgotten = [job_id for job_id in job_ids if job_id not in jobs]  # slurmctld drops a job MinJobAge after its end
    try:
        if wanted := [*dict.fromkeys([*starts, *forgotten])][:MAX_JOBS]:
            records = client.histories(wanted, ANSWER_S)
    except SlurmError as error:
        note = note or str(error)
    for past in records:  # in order of their starts: the last one of each job stays
        # slurmdbd may lag behind: its "RUNNING" counts only if slurmctld cannot be asked.
        if past.job_id in forgotten and (past.state in TERMINAL_STATES or unreachable):
            start, end = (past.submitted, past.started, None), (past.ended, None, "sacct")
            jobs[past.job_id] = SlurmJob(past.job_id, past.state, past.reason, past.node_list, *start, *end)
    return SlurmSnapshot(asked, jobs, note, unreachable, tuple(records), time.monotonic(), not unreachable)
