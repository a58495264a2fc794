"""Call squeue, scontrol, sacct, sinfo and scancel, and return typed values. Nothing else in the project calls them.

Every function raises SlurmError if a program is missing or refuses, and NoAnswerError if Slurm does not answer: without
slurmctld, Slurm's programs retry for 4 to 8 s, longer where MessageTimeout is long. No command goes through a shell.
"""

import os
import re
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from subprocess import CompletedProcess

from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.parse import (
    END_OF_FIELD,
    END_OF_ROW,
    columns,
    parse_configuration,
    parse_history,
    parse_nodes,
    parse_partitions,
    parse_queue,
    parse_shown_job,
)
from slurm.types import Configuration, Node, Partition, PastJob, QueuedJob, ShownJob

TIMEOUT_S = 15.0  # for one call; most calls without slurmctld fail before that

# A user may set these (SQUEUE_FORMAT, SINFO_PARTITION, ...). They change which rows are printed, and how.
_FORMAT_VARIABLES = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_BITSTR_LEN")
_NODE = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
NO_CLUSTER = "Could not establish a configuration source"
# Exit codes do not tell "no answer" from a refusal: these are texts of slurm_strerror(3) and of errno.
_NO_ANSWER = (
    r"Unable to contact slurm controller|Socket timed out|Unexpected message received|Connection refused"
    r"|Zero Bytes were transmitted or received|in standby mode"
)


def queue(job_ids: Sequence[str] | None = None) -> list[QueuedJob]:
    """Return the user's jobs that wait or run, each task of an array by itself; if given, only those of `job_ids`.

    The id of an array selects all of its tasks.
    """
    wanted = None if job_ids is None else {_checked_id(job_id) for job_id in job_ids}
    return [
        replace(job, nodes=host_names(job.node_list))
        for job in _squeue()
        if wanted is None or {job.job_id, job.raw_job_id, job.job_id.partition("_")[0]} & wanted
    ]


def remembered(timeout_s: float = TIMEOUT_S, users: Collection[int] = ()) -> list[QueuedJob]:
    """Return the jobs of queue(), and those that ended less than MinJobAge ago, also those of the `users` with these
    ids. `nodes` is left empty."""
    return _squeue("--states=all", timeout_s=timeout_s, users={os.geteuid(), *users})


def show_job(job_id: str) -> ShownJob | None:
    """Return the job as slurmctld knows it; None once it has forgotten it, MinJobAge after the job's end.

    A number alone is Slurm's raw id. The raw id of an array's last task is also the id of the whole array.
    """
    ended = _run("scontrol", "--all", "show", "job", _checked_id(job_id))
    # 22.05 prints "not found" for a task that is gone while other tasks of its array are still known.
    unknown = rf"Invalid job id specified|^Job {job_id} not found$"
    if ended.returncode and re.search(unknown, ended.stderr + ended.stdout, re.M):
        return None
    return parse_shown_job(_output(ended), job_id)


def histories(job_ids: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[PastJob]:
    """Return the records of accounting, one for each start of each job, oldest first; [] without accounting.

    A number alone is a raw id, as in show_job.
    """
    fields = ("--parsable2", f"--delimiter={END_OF_FIELD}", f"--format={','.join(columns(PastJob))}")
    wanted = f"--jobs={','.join(map(_checked_id, job_ids))}"
    # --duplicates: without it sacct shows only the last start of a job that was requeued.
    ended = _run("sacct", "--duplicates", "--allocations", "--noheader", *fields, wanted, timeout_s=timeout_s)
    if ended.returncode and "accounting storage is disabled" in ended.stderr:
        return []
    return [job for job in parse_history(_output(ended)) if {job.job_id, job.raw_job_id} & {*job_ids}]


def state_of(job_id: str) -> str | None:
    """Return the job's state from slurmctld or, if that has forgotten the job or does not answer, from accounting.

    Return None if neither knows it. Raises SlurmError if one of them did not answer and the other does not know.
    """
    no_answer = None
    try:
        if (shown := show_job(job_id)) is not None:
            return shown.state
    except SlurmError as error:
        no_answer = error
    past = histories([job_id])  # slurmdbd can answer while slurmctld is away
    if not past and no_answer is not None:
        raise no_answer
    return past[-1].state if past else None


def partitions() -> list[Partition]:
    """Return the partitions, hidden ones too."""
    # --exact: without it sinfo prints "4+" where the nodes of a partition differ.
    options = ("--all", "--exact", "--noheader")
    return parse_partitions(_call("sinfo", *options, "--format", END_OF_FIELD.join(columns(Partition))))


def nodes_of(partition: str) -> list[Node]:
    """Return the nodes of a partition that the user may see."""
    options = ("--noheader", "--Node", f"--partition={partition}", "--format", END_OF_FIELD.join(columns(Node)))
    return parse_nodes(_call("sinfo", *options))


def configuration() -> Configuration:
    """Return how the cluster is configured."""
    return parse_configuration(_call("scontrol", "show", "config"))


def host_names(node_list: str) -> tuple[str, ...]:
    """Expand a list of nodes as Slurm writes it, "node[0-2,7]", in its order. This does not need slurmctld."""
    if re.fullmatch(rf"({_NODE})?", node_list):
        return (node_list,) if node_list else ()
    if not re.fullmatch(rf"{_NODE}[\w.,\[\]-]*", node_list, re.ASCII):
        raise SlurmError(f"{node_list[:100]!r} is no list of nodes, such as node[0-2,7]")
    return tuple(_call("scontrol", "show", "hostnames", node_list).split())


def node_names() -> tuple[str, ...]:
    """Return the names of all nodes that the user may see."""
    # sinfo prints a node once for each of its partitions.
    return tuple(dict.fromkeys(_call("sinfo", "--all", "--noheader", "--Node", "--format=%N").split()))


def node_address(name: str) -> str | None:
    """Return the address by which Slurm reaches the node (NodeAddr); None if there is no such node."""
    if not re.fullmatch(_NODE, name):
        raise SlurmError(f"{name[:100]!r} is no node's name")
    ended = _run("scontrol", "show", "node", "--oneliner", name)
    if ended.returncode and f"Node {name} not found" in ended.stdout:
        return None
    if (address := re.search(r" NodeAddr=(\S+) ", _output(ended))) is None:
        raise SlurmError(f"scontrol show node {name} prints no NodeAddr")
    return address[1]


def would_accept(script: str) -> tuple[bool, str]:
    """Return True if sbatch would take `script`, by its own judgement (--test-only), which knows plugins and QOS flags;
    and what it says: when and where the job would start, or why not.

    Call it in submission_environment. A False is no proof: with all nodes down it is False, while sbatch takes the job.
    """
    ended = _run("sbatch", "--test-only", text=script)
    local = re.sub(r"(?<= start at )\d+", lambda found: time.ctime(int(found[0])), ended.stderr)  # for people
    said = [line.removeprefix("sbatch: ") for line in local.splitlines() if line.startswith("sbatch: ")]
    return ended.returncode == 0, "; ".join(said) or (ended.stderr + ended.stdout).strip()


def requeue(job_id: str, restart_count: int) -> None:
    """End the allocation that has this restart count, and put the job back in the queue.

    Safe to repeat, also after an error that left open if Slurm had accepted it: a job that waits, or has been restarted
    since, is left alone. Inside a job, use the raw id. Raises EndingError for a job that was cancelled and whose tasks
    have not ended yet: scontrol requeue would start it again.
    """
    if (job := show_job(job_id)) is None:
        raise SlurmError(f"job {job_id} cannot be requeued: Slurm does not know it any more")
    if _is_requeued(job, restart_count):
        return
    # A job at its time limit is COMPLETING too, but that end is the reason for its requeue.
    if job.state == "COMPLETING" and job.reason != "TimeLimit":
        raise EndingError(f"job {job_id} is not requeued: it is being ended already (scancel?)")
    ended = _run("scontrol", "requeue", job.job_id)
    if ended.returncode:
        job = show_job(job_id)  # the call may have had its effect all the same, or Slurm requeued the job itself
        if job is None or not _is_requeued(job, restart_count):
            raise _error(ended)


def exclude_nodes(job_id: str, names: Sequence[str]) -> None:
    """Let the job never start on these nodes, nor on those that it excludes already.

    Slurm refuses while the job runs, and accepts once its allocation ends for a requeue.
    """
    if (job := show_job(job_id)) is None:
        raise SlurmError(f"job {job_id} takes no nodes to exclude: Slurm does not know it any more")
    excluded = ",".join(dict.fromkeys([*host_names(job.excluded), *names]))
    # By this id: the raw id of an array's last task is also that of the whole array.
    _call("scontrol", "update", f"JobId={job.job_id}", f"ExcNodeList={excluded}")


def cancel(job_id: str) -> None:
    """End a job that waits or runs (TERM, after KillWait KILL). Does nothing to a job that has ended."""
    _call("scancel", _checked_id(job_id))


def signal_job(job_id: str, name: str) -> None:
    """Send the signal, "USR2", to all processes of the job's srun tasks, not to its batch script.

    Raises SlurmError if the job is not running: scancel would retry for minutes.
    """
    if not re.fullmatch("[A-Z0-9]+", name):
        raise SlurmError(f"{name[:100]!r} is no signal, such as USR2")
    job = show_job(job_id)
    if job is None or job.state != "RUNNING":
        state = job.state if job else "forgotten"
        raise SlurmError(f"job {job_id} is {state}, and takes no signal; it must be RUNNING")
    _call("scancel", f"--signal={name}", job_id)  # without --batch: the tasks get it


def _squeue(*arguments: str, timeout_s: float = TIMEOUT_S, users: Collection[int] = ()) -> list[QueuedJob]:
    fields = f":{END_OF_FIELD},".join(columns(QueuedJob)) + f":{END_OF_ROW}"
    whose = f"--user={','.join(map(str, users))}" if len(users) > 1 else "--me"
    options = ("--all", whose, "--array", "--noheader", *arguments, "--Format", fields)  # --all: hidden partitions too
    return parse_queue(_call("squeue", *options, timeout_s=timeout_s))


def _is_requeued(job: ShownJob, restart_count: int) -> bool:
    return job.state == "PENDING" or job.restarts > restart_count


def _checked_id(job_id: str) -> str:
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job_id):
        raise SlurmError(f"{job_id[:100]!r} is no job id, such as 123 or 120_3")
    return job_id


def _call(program: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> str:
    return _output(_run(program, *arguments, timeout_s=timeout_s))


def _run(program: str, *arguments: str, timeout_s: float = TIMEOUT_S, text: str = "") -> CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_FORMAT_VARIABLES)}
    env |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}  # English errors, and Unix seconds
    try:
        return subprocess.run(
            [program, *arguments],
            env=env,
            input=text,  # and no program may wait for the terminal
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # job names may be in another encoding
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise SlurmError(f"{program} is not on the PATH; run this where Slurm's programs are") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"slurmctld does not answer: {program} ran for {timeout_s:g} s") from None


def _output(ended: CompletedProcess[str]) -> str:
    if ended.returncode:
        raise _error(ended)
    return ended.stdout


def _error(ended: CompletedProcess[str]) -> SlurmError:
    command = " ".join(word for word in ended.args if word.isprintable() and not word.startswith("--"))
    text = "; ".join((ended.stderr + ended.stdout).split("\n")).strip("; ") or f"exit code {ended.returncode}"
    if NO_CLUSTER in text:
        found = "Slurm's programs are here, but no cluster is configured"
        return SlurmError(f"{found}; set SLURM_CONF, or use a login node ({NO_CLUSTER})")
    if re.search(_NO_ANSWER, text):
        return NoAnswerError(f"Slurm does not answer: {command}: {text[:300]}")
    return SlurmError(f"{command}: {text[:300]}")
