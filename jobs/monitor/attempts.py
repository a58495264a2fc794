"""List the attempts of a run: how long each waited and lasted, and why it ended."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import Attempt, list_attempts
from fnet_dist.run.failure import cause_of_hang, first_failure, read_failures, silent_ranks
from fnet_dist.run.run_dir import RunDir, mtime, read_json
from jobs.monitor.job_state import WORDS
from jobs.monitor.run_state import Line, State
from slurm.types import PastJob

NO_WORD = "no word"  # the attempt was killed: it wrote no end.json


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt. `end` and `detail` say why it ended, or the state of one that has not; `step` is its last step.

    `began` is Unix time, `since` the same for people. `waited_s` is the time from the job's submission, or from the end
    of the attempt before in the job's last allocation, to begin.json; None if it did not wait or that is not known.
    `nodes` are as Slurm writes them, or the host. `message` is the error of the rank that failed first. `replay` is
    "passed" or "failed again" if it repeated steps that had failed. `excluded_nodes` are those that its job excluded,
    each with a line for each failure on it.
    """

    number: int
    end: str
    detail: str
    step: int | None
    began: float | None
    since: str | None
    waited_s: float | None
    lasted_s: float | None
    ranks: int | None
    nodes: str | None
    job_id: str | None
    restarts: int | None
    message: str | None = None
    node: str | None = None  # of the rank at fault
    replay: str | None = None
    excluded_nodes: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_attempts(run: RunDir, state: State, records: Sequence[PastJob] = ()) -> list[AttemptSummary]:
    """Return the attempts of `run`, which is in `state`, the newest first.

    `records` are accounting's of the jobs in killed_jobs(run); they may say why an attempt has no end.json.
    """
    attempts = list_attempts(run)
    begins: list[Line] = [attempt.read_begin() for attempt in attempts]
    submitted = read_json(run.job) or {"id": None}
    found: list[AttemptSummary] = []
    ended_at = 0.0
    for attempt, begin, before, after in zip(attempts, begins, [{}, *begins], [*begins[1:], None], strict=False):
        end, job_id, began = attempt.read_end(), begin.get("slurm_job_id"), begin.get("time")
        restarts, ready_at = begin.get("slurm_restart_count"), None
        if job_id is not None and job_id != before.get("slurm_job_id"):
            ready_at = submitted["time"] if job_id == submitted["id"] else None  # a job by sbatch: not known
        elif job_id is not None and (before["slurm_restart_count"] or 0) < (restarts or 0):
            ready_at = ended_at  # requeued: it waits since its last allocation
        ended_at = mtime(attempt.heartbeat) if end is None else end["time"]
        if end is not None:
            word, detail = end["reason"], "(restarted)" if end["restarts"] else ""
        elif after is not None:
            word, detail = _why_killed(begin, after, records)
        else:
            word, detail = (NO_WORD, "(requeued)") if state.word == "requeued" else (state.word, state.detail)
        waited_s = None if ready_at is None or began is None else max(0.0, began - ready_at)  # clocks may differ
        lasted_s = None if began is None else ended_at - began
        when = (None if end is None else end["step"], began, begin.get("since"), waited_s, lasted_s)
        where = (begin.get("world_size"), begin.get("nodes") or begin.get("host"), job_id, restarts)
        error = _first_error(attempt, begin.get("world_size") or 0)
        failure, excluded = (end or {}).get("failure") or {}, begin.get("excluded_nodes") or {}
        more = (error, failure.get("node"), (end or {}).get("replay"), excluded)
        found.append(AttemptSummary(attempt.number, word, detail, *when, *where, *more))
    return found[::-1]


def killed_jobs(run: RunDir) -> list[str]:
    """Return the ids of the Slurm jobs whose attempts were followed by another without an end.json."""
    killed = [attempt for attempt in list_attempts(run)[:-1] if not attempt.end.exists()]
    begins: list[Line] = []
    with suppress(FnetError):  # the status says what cannot be read
        begins = [attempt.read_begin() for attempt in killed]
    return [*dict.fromkeys(begin["slurm_job_id"] for begin in begins if begin.get("slurm_job_id"))]


def _first_error(attempt: Attempt, world_size: int) -> str | None:
    """Return the message of the rank that failed first, on one line; None if no rank has failed."""
    failures = read_failures(attempt)
    first = cause_of_hang(failures, world_size) or first_failure(failures)
    if first is None:
        return None
    if killed := silent_ranks(failures, world_size):
        ranks = f"rank{'s' * (len(killed) > 1)} {', '.join(map(str, killed[:8]))}{' ...' * (len(killed) > 8)}"
        return f"{ranks}: ended without a message: killed, perhaps for memory (dmesg on its node tells)"
    # All ranks that raise one error for something they all know write the same message: then no rank is named.
    alike = [each for each in failures if (each.aftermath, each.message) == (first.aftermath, first.message)]
    text = " ".join(first.message.split())
    return text if len(alike) > 1 or first.reason == "hang" else f"rank {first.rank}: {text}"


def _why_killed(begin: Line, next_begin: Line, records: Sequence[PastJob]) -> tuple[str, str]:
    """Return end and detail of an attempt without end.json, by accounting or by the attempt that followed it."""
    job_id = begin.get("slurm_job_id")
    for record in records:
        if record.job_id != job_id or record.started is None or record.ended is None:
            continue
        if record.started <= begin["time"] <= record.ended + 1:  # Slurm's times are whole seconds
            return WORDS.get(record.state, record.state.lower()), ""
    return NO_WORD, "(requeued)" if job_id and job_id == next_begin.get("slurm_job_id") else "(killed?)"
