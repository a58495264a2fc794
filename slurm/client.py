"""The only caller of squeue, scontrol, sacct, sinfo and scancel: questions to Slurm with typed answers.

Every function raises SlurmError where a program is missing, refuses, or gets no answer: with slurmctld gone, Slurm's
programs try for 4 to 8 s, longer where MessageTimeout is long. Commands are lists of arguments, never a shell's.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.parse import (
    END_OF_FIELD,
    END_OF_ROW,
    HISTORY_FIELDS,
    PARTITION_FIELDS,
    QUEUE_FIELDS,
    parse_configuration,
    parse_history,
    parse_partitions,
    parse_queue,
    parse_shown_job,
)
from slurm.types import Configuration, Partition, PastJob, QueuedJob, ShownJob

TIMEOUT_S = 15.0

# Each of these would change what is asked for, or its form.
_WISHES = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_BITSTR_LEN")
_NODE = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
NO_CLUSTER = "Could not establish a configuration source"
_NO_ANSWER = (
    r"Unable to contact slurm controller|Socket timed out|Unexpected message received|Connection refused"
    r"|Zero Bytes were transmitted or received|in standby mode"
)


@dataclass(frozen=True)
class _Answer:
    command: str
    code: int
    out: str
    error: str


def queue(job_ids: Sequence[str] | None = None) -> list[QueuedJob]:
    """The user's own jobs that wait or run, each task of an array by itself; of those only `job_ids`, if given.

    An array's id stands for all of its tasks.
    """
    wanted = None if job_ids is None else {_checked_id(job_id) for job_id in job_ids}
    jobs = _squeue()
    return [
        replace(job, nodes=host_names(job.node_list))
        for job in jobs
        if wanted is None or {job.job_id, job.raw_job_id, job.job_id.partition("_")[0]} & wanted
    ]


def remembered(timeout_s: float = TIMEOUT_S) -> list[QueuedJob]:
    """The user's own jobs that slurmctld remembers: those of queue(), and those that ended less than MinJobAge ago.

    `nodes` is left empty.
    """
    return _squeue("--states=all", timeout_s=timeout_s)


def show_job(job_id: str) -> ShownJob | None:
    """The job as slurmctld remembers it; None once it has forgotten it, MinJobAge after the job's end.

    A number alone is Slurm's raw id, which for an array's last task is also the id of the whole array.
    """
    answer = _ask("scontrol", "show", "job", _checked_id(job_id))
    # An array's task that is gone while others are still known is "not found".
    if answer.code and re.search(
        rf"Invalid job id specified|^Job {job_id} not found$", answer.error + answer.out, re.M
    ):
        return None
    return parse_shown_job(_text_of(answer), job_id)


def history(job_id: str) -> list[PastJob]:
    """What accounting recorded of the job, one record for each of its starts, oldest first; [] without accounting.

    A number alone is a raw id, as in show_job.
    """
    return histories([job_id])


def histories(job_ids: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[PastJob]:
    """The same of several jobs, in one question."""
    fields = ("--parsable2", f"--delimiter={END_OF_FIELD}", f"--format={','.join(HISTORY_FIELDS)}")
    wanted = f"--jobs={','.join(map(_checked_id, job_ids))}"
    answer = _ask("sacct", "--duplicates", "--allocations", "--noheader", *fields, wanted, timeout_s=timeout_s)
    if answer.code and "accounting storage is disabled" in answer.error:
        return []
    return [job for job in parse_history(_text_of(answer)) if {job.job_id, job.raw_job_id} & {*job_ids}]


def state_of(job_id: str) -> str | None:
    """The job's state from slurmctld or, where it has forgotten the job or does not answer, from accounting.

    None if neither knows it. Raises SlurmError if one of them did not answer and the other does not know.
    """
    silent = None
    try:
        if (shown := show_job(job_id)) is not None:
            return shown.state
    except SlurmError as error:
        silent = error
    past = history(job_id)
    if not past and silent is not None:
        raise silent
    return past[-1].state if past else None


def partitions() -> list[Partition]:
    """The partitions that the user may see."""
    return parse_partitions(_asked("sinfo", "--exact", "--noheader", "--format", END_OF_FIELD.join(PARTITION_FIELDS)))


def configuration() -> Configuration:
    """How the cluster is set up."""
    return parse_configuration(_asked("scontrol", "show", "config"))


def host_names(node_list: str) -> tuple[str, ...]:
    """The nodes of a list as Slurm writes it, "node[0-2,7]", in its order. slurmctld is not asked."""
    if re.fullmatch(rf"({_NODE})?", node_list):
        return (node_list,) if node_list else ()
    if not re.fullmatch(rf"{_NODE}[\w.,\[\]-]*", node_list, re.ASCII):
        raise SlurmError(f"{node_list[:100]!r} is no list of nodes, such as node[0-2,7]")
    return tuple(_asked("scontrol", "show", "hostnames", node_list).split())


def node_names() -> tuple[str, ...]:
    """Every node of the cluster that the user sees."""
    return tuple(dict.fromkeys(_asked("sinfo", "--noheader", "--Node", "--format=%N").split()))


def node_address(name: str) -> str | None:
    """The address by which Slurm reaches the node (NodeAddr); None if it has no such node."""
    if not re.fullmatch(_NODE, name):
        raise SlurmError(f"{name[:100]!r} is no node's name")
    answer = _ask("scontrol", "show", "node", "--oneliner", name)
    if answer.code and f"Node {name} not found" in answer.out:
        return None
    found = re.search(r" NodeAddr=(\S+) ", _text_of(answer))
    if found is None:
        raise SlurmError(f"{answer.command} says no NodeAddr")
    return found[1]


def requeue(job_id: str, restart_count: int) -> None:
    """Have the allocation with this restart count end and the job wait in the queue again.

    May be repeated, also after an error that left open whether Slurm had taken it: a job that waits, or has been
    restarted since, is left alone. Raises EndingError for one that was cancelled and whose tasks still end: Slurm would
    start it again. Use the raw id from inside a job.
    """
    job = show_job(job_id)
    if job is None:
        raise SlurmError(f"job {job_id} cannot be requeued: Slurm does not know it any more")
    if _requeued(job, restart_count):
        return
    if job.state == "COMPLETING" and job.reason != "TimeLimit":
        raise EndingError(f"job {job_id} is not requeued: it is being ended already (scancel?)")
    answer = _ask("scontrol", "requeue", job.job_id)
    if answer.code:
        job = show_job(job_id)
        if job is None or not _requeued(job, restart_count):
            raise _error(answer)


def cancel(job_id: str) -> None:
    """End a job that waits or runs (TERM, KillWait, KILL); nothing happens to one that has ended."""
    _asked("scancel", _checked_id(job_id))


def signal_job(job_id: str, name: str) -> None:
    """Send the signal, "USR2", to all processes of the job's srun tasks, not to its batch script.

    Raises SlurmError also where the job does not run: scancel would try for minutes.
    """
    if not re.fullmatch("[A-Z0-9]+", name):
        raise SlurmError(f"{name[:100]!r} is no signal, such as USR2")
    job = show_job(job_id)
    if job is None or job.state != "RUNNING":
        raise SlurmError(
            f"job {job_id} is {job.state if job else 'forgotten'}, and takes no signal; it must be RUNNING"
        )
    _asked("scancel", f"--signal={name}", job_id)


def _squeue(*arguments: str, timeout_s: float = TIMEOUT_S) -> list[QueuedJob]:
    fields = [*(f"{field}:{END_OF_FIELD}" for field in QUEUE_FIELDS[:-1]), f"{QUEUE_FIELDS[-1]}:{END_OF_ROW}"]
    words = ("--me", "--array", "--noheader", *arguments, "--Format", ",".join(fields))
    return parse_queue(_text_of(_ask("squeue", *words, timeout_s=timeout_s)))


def _requeued(job: ShownJob, restart_count: int) -> bool:
    return job.state == "PENDING" or job.restarts > restart_count


def _checked_id(job_id: str) -> str:
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job_id):
        raise SlurmError(f"{job_id[:100]!r} is no job id, such as 123 or 120_3")
    return job_id


def _asked(program: str, *arguments: str) -> str:
    return _text_of(_ask(program, *arguments))


def _ask(program: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> _Answer:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_WISHES)}
    env |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    try:
        ended = subprocess.run(
            [program, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise SlurmError(f"{program} is not on the PATH; run this where Slurm's programs are") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"slurmctld does not answer: {program} ran for {timeout_s:g} s") from None
    command = " ".join([program, *(word for word in arguments if word.isprintable() and not word.startswith("--"))])
    return _Answer(command, ended.returncode, ended.stdout, ended.stderr)


def _text_of(answer: _Answer) -> str:
    if answer.code:
        raise _error(answer)
    return answer.out


def _error(answer: _Answer) -> SlurmError:
    text = "; ".join((answer.error + answer.out).split("\n")).strip("; ") or f"exit code {answer.code}"
    if NO_CLUSTER in text:
        return SlurmError(
            f"Slurm's programs are here, but they know no cluster; set SLURM_CONF, or use a login node ({NO_CLUSTER})"
        )
    if re.search(_NO_ANSWER, text):
        return NoAnswerError(f"Slurm does not answer: {answer.command}: {text[:300]}")
    return SlurmError(f"{answer.command}: {text[:300]}")
