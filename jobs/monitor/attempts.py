"""The attempts of a run, one by one: how long each waited and lasted, and why it ended."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fnet_dist.errors import FnetError
from fnet_dist.run.attempt import Attempt, list_attempts
from fnet_dist.run.run_dir import RunDir, mtime, read_json
from fnet_dist.run.stop import stop_reason
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
    """What the rank that failed first said, or whoever saw it die; None if none has failed."""
    said = list[tuple[bool, int, int, str]]()
    for path in attempt.begin.parent.glob("rank_*.error"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # half written, or another version's
            told = json.loads(path.read_text())
            if stop_reason(told["reason"]).status == "stopped":
                continue
            message = told["message"]
            rank, text = int(path.stem.partition("_")[2]), " ".join(str(message["message"]).split())
            said.append((told["aftermath"], int(message["extraInfo"]["timestamp"]), rank, text))
    if not said:
        return None
    aftermath, _, rank, text = min(said)
    agreed = sum(other[0] == aftermath and other[3] == text for other in said) > 1  # all know of it, a loss say
    return text if agreed else f"rank {rank}: {text}"


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
