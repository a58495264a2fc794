"""The attempts of a run, one by one: how long each waited and lasted, and why it ended."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import Attempt, list_attempts
from fnet_dist.run.failure import first_failure, read_failures
from fnet_dist.run.run_dir import RunDir, mtime, read_json
from jobs.monitor.job_state import WORDS
from jobs.monitor.run_state import Line, State
from slurm.types import PastJob

NO_WORD = "no word"


@dataclass(frozen=True)
class AttemptSummary:
    """An attempt. `end`, and `detail`, is why it ended, or how it stands; `step` its last, None until it has ended;
    `began` the Unix time, `since` the same for people; `nodes` as Slurm writes them, or the host.

    `message` is what the rank that failed first said. `waited_s` is the time from the job's submission, or from the end
    of the attempt before in another allocation of the same job, to the begin, start of its launcher included; None
    where it did not wait, or nobody knows.
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


def read_attempts(run: RunDir, state: State, records: Sequence[PastJob] = ()) -> list[AttemptSummary]:
    """The attempts of `run`, which is in `state`, the newest first; `records` may tell of those without a word."""
    attempts = list_attempts(run)
    begins: list[Line] = [read_json(attempt.begin) or {} for attempt in attempts]
    submitted = read_json(run.job) or {"id": None}
    found: list[AttemptSummary] = []
    over = submitted["time"] if submitted["id"] else None
    for i, (attempt, begin) in enumerate(zip(attempts, begins, strict=True)):
        end, job_id, began = read_json(attempt.end), begin.get("slurm_job_id"), begin.get("time")
        before = begins[i - 1] if i else {}
        is_first = job_id is not None and job_id != before.get("slurm_job_id")
        again = not is_first and job_id is not None and _restarts(before) < _restarts(begin)
        came = submitted["time"] if is_first and job_id == submitted["id"] else over if again else None
        over = mtime(attempt.heartbeat) if end is None else end["time"]
        word, detail = (state.word, state.detail) if attempt == attempts[-1] else (NO_WORD, "(killed?)")
        if end is not None:
            word, detail = end["reason"], "(restarted)" if end["restarts"] else ""
        elif attempt != attempts[-1]:
            word, detail = _lost(begin, begins[i + 1], records) or (word, detail)
        elif word == "requeued":
            word, detail = NO_WORD, "(requeued)"
        found.append(
            AttemptSummary(
                number=attempt.number,
                end=word,
                detail=detail,
                step=None if end is None else end["step"],
                began=began,
                since=begin.get("since"),
                waited_s=None if came is None or began is None else max(0.0, began - came),
                lasted_s=None if began is None else over - began,
                ranks=begin.get("world_size"),
                nodes=begin.get("nodes") or begin.get("host"),
                job_id=job_id,
                restarts=begin.get("slurm_restart_count"),
                message=_first_error(attempt),
            )
        )
    return found[::-1]


def wordless_jobs(run: RunDir) -> list[str]:
    """The Slurm jobs of attempts that were overtaken without a word: accounting may know why."""
    wordless = [attempt for attempt in list_attempts(run)[:-1] if not attempt.end.exists()]
    begins: list[Line] = []
    with suppress(FnetError):  # the table says what cannot be read
        begins = [read_json(attempt.begin) or {} for attempt in wordless]
    return [*dict.fromkeys(begin["slurm_job_id"] for begin in begins if begin.get("slurm_job_id"))]


def _first_error(attempt: Attempt) -> str | None:
    """Return the message of the rank that failed first, on one line; None if no rank has failed."""
    failures = read_failures(attempt)
    first = first_failure(failures)
    if first is None:
        return None
    # All ranks that raise one error for something they all know write the same message: then no rank is named.
    alike = [each for each in failures if (each.aftermath, each.message) == (first.aftermath, first.message)]
    text = " ".join(first.message.split())
    return text if len(alike) > 1 else f"rank {first.rank}: {text}"


def _lost(begin: Line, later: Line, records: Sequence[PastJob]) -> tuple[str, str] | None:
    """Why an attempt got no word out: what accounting has recorded, or that its job was started again."""
    for record in records:
        if record.job_id != begin.get("slurm_job_id") or record.started is None or record.ended is None:
            continue
        if record.started <= begin["time"] <= record.ended + 1:
            return WORDS.get(record.state, record.state.lower()), ""
    if begin.get("slurm_job_id") and begin["slurm_job_id"] == later.get("slurm_job_id"):
        return NO_WORD, "(requeued)"
    return None


def _restarts(begin: Line) -> int:
    return begin.get("slurm_restart_count") or 0
