"""What Slurm says of the jobs of runs: one squeue for all, one sacct for those that slurmctld has forgotten."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import RunDir, mtime, read_json
from fnet_dist.run.stop import stop_reason
from slurm import client
from slurm.errors import SlurmError
from slurm.types import PastJob, QueuedJob

ASK_S = 5.0  # for an answer; slurmctld may be away, and a table has to come all the same
ASK_EVERY_S = 10.0  # sites ask not to be asked more often
MAX_JOBS = 100  # ids in a question to sacct: those of the runs that were active last
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True)
class RunJob:
    """A run's newest Slurm job, as far as the run's directory tells of it.

    `restarts` is Slurm's count at the last attempt in the job, None before the first; `reason` why that attempt ended,
    None while nobody has said; `since` when the job was submitted or, after its first attempt, when that one was over.
    """

    job_id: str
    restarts: int | None
    reason: str | None
    since: float

    @property
    def is_over(self) -> bool:
        """Whether the attempt's end is the job's: Slurm need not be asked."""
        return self.reason is not None and stop_reason(self.reason).slurm == "end"


@dataclass(frozen=True)
class Job:
    """A job in Slurm's words. Times are Unix seconds; `started` and `ends`, by the time limit, are None while it waits,
    `expected` is when it may start; after its end `ends` is that. `told_by` is squeue or sacct."""

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
    """What Slurm said when it was asked for the jobs `asked`, at `time` by the monotonic clock. Of `jobs` those are
    left out that it does not know; `past` are the records that accounting was asked for. `note` says why it gave no
    answer, in one line; `silent`: it may give one later."""

    asked: frozenset[str] = frozenset()
    jobs: Mapping[str, Job] = field(default_factory=dict)
    note: str = ""
    silent: bool = False
    past: tuple[PastJob, ...] = ()
    time: float = 0.0

    def knows(self, job_id: str) -> bool:
        """Whether it is known what became of the job, be it only that Slurm has forgotten it."""
        return job_id in self.jobs or (job_id in self.asked and not self.note)


EMPTY_SNAPSHOT = SlurmSnapshot()


def run_job_of(run: RunDir) -> RunJob | None:
    """The newest Slurm job of `run`; None where its last attempt, or what was submitted since, is not Slurm's."""
    submitted, last = read_json(run.job), last_attempt(run)
    begin: dict[str, Any] = {"slurm_job_id": None, "time": 0} if last is None else read_json(last.begin)
    known = begin["slurm_job_id"]
    if submitted is not None and submitted["id"] != known and submitted["time"] > begin["time"]:
        return RunJob(submitted["id"], None, None, submitted["time"]) if submitted["cluster"] == "slurm" else None
    if last is None or known is None:
        return None
    end, restarts = read_json(last.end), begin["slurm_restart_count"]
    if end is None or end["restarts"]:
        return RunJob(known, restarts, None, mtime(last.heartbeat))
    return RunJob(known, restarts, end["reason"], end["time"])


def ask(job_ids: Sequence[str], before: SlurmSnapshot = EMPTY_SNAPSHOT, starts: Sequence[str] = ()) -> SlurmSnapshot:
    """What Slurm says of the jobs, and what accounting has recorded of the jobs `starts`; `before` itself while that is
    new enough. Takes 2 x ASK_S at most, raises nothing."""
    asked = frozenset(job_ids) | frozenset(starts)
    if not asked:
        return EMPTY_SNAPSHOT
    if asked <= before.asked and time.monotonic() - before.time < ASK_EVERY_S:
        return before
    if shutil.which("squeue") is None:
        note = "Slurm's programs are not on the PATH; its jobs are shown as the run directories know them"
        return SlurmSnapshot(asked, note=note, time=time.monotonic())
    note, jobs, past = "", dict[str, Job](), list[PastJob]()
    try:
        jobs = {job.job_id: _queued(job) for job in client.remembered(ASK_S) if job.job_id in asked}
    except SlurmError as error:
        note = str(error)
    silent = bool(note)
    forgotten = [job_id for job_id in job_ids if job_id not in jobs]
    try:
        if wanted := [*dict.fromkeys([*starts, *forgotten])][:MAX_JOBS]:
            past = client.histories(wanted, ASK_S)
    except SlurmError as error:
        note = note or str(error)
    for record in past:  # the last start of each stays
        # Accounting may not have heard of an end.
        if record.job_id in forgotten and (record.state in OVER or silent):
            jobs[record.job_id] = _past(record)
    return SlurmSnapshot(asked, jobs, note, silent, tuple(past), time.monotonic())


def _queued(job: QueuedJob) -> Job:
    ends = None if job.state in WAITING else job.ends
    times = (job.submitted, job.started, job.expected_start, ends)
    return Job(job.job_id, job.state, job.reason, job.node_list, *times, job.restarts, "squeue")


def _past(job: PastJob) -> Job:
    times = (job.submitted, job.started, None, job.ended)
    return Job(job.job_id, job.state, job.reason, job.node_list, *times, None, "sacct")
