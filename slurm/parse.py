"""Parse what Slurm's programs print into the classes of slurm/types.py. Any text of another form raises SlurmError.

Times are Unix seconds (SLURM_TIME_FORMAT=%s): local times are ambiguous for an hour a year. Fields end with the control
character US and rows with RS, which no field but a job's name can contain. JSON output would be simpler, but squeue and
sacct print it only where Slurm was built with the plugin, and its keys change between versions.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from slurm.errors import SlurmError
from slurm.types import WAITING_STATES, Configuration, Node, Partition, PastJob, QueuedJob, ShownJob
from slurm.values import unexpected

END_OF_FIELD, END_OF_ROW = "\x1f", "\x1e"  # US and RS of ASCII
T = TypeVar("T")


def columns(kind: type[Any]) -> list[str]:
    """Return the columns to ask a program for, from which `kind` is built, in their order."""
    return [each.metadata["column"] for each in fields(kind) if each.metadata]


def parse_queue(text: str) -> list[QueuedJob]:
    """Parse the rows of `squeue --Format`. `nodes` is left empty."""
    # While a job waits, StartTime is the scheduler's estimate.
    return [
        replace(job, started=None, expected_start=job.started) if job.state in WAITING_STATES else job
        for job in _rows(QueuedJob, "squeue", text, END_OF_ROW + "\n")
    ]


def parse_shown_job(text: str, job_id: str) -> ShownJob | None:
    """Return the job `job_id` of those that `scontrol show job` prints; None if it is not among them.

    For the id of an array Slurm prints all tasks. The one whose raw id is `job_id` is returned.
    """
    for block in re.split(r"\n(?=JobId=)", text.strip()):
        # A user can put any text into the name, which comes first, and into the fields from Command on.
        shown = re.fullmatch(
            r"JobId=(\d+) (?:ArrayJobId=(\d+) ArrayTaskId=(\S+) )?(?:.*? )??JobName=(.*?)"
            r"\n   (UserId=.*?)\n   Command=.*",
            block,
            re.DOTALL,
        )
        if shown is None:
            raise unexpected("scontrol show job", block)
        raw, array, task, name, details = shown.groups()
        if "_" in job_id or job_id == raw:
            texts = {"PreemptTime": "", **dict(re.findall(r"(\S+?)=(\S*)", details))}  # only jobs that can be preempted
            full_id = f"{array}_{task}" if array else raw
            own = {"job_id": job_id if "_" in job_id else full_id, "raw_job_id": raw, "name": name}
            job = _build(ShownJob, f"scontrol show job {job_id}", texts, **own)
            return replace(job, started=None) if job.state in WAITING_STATES else job
    return None


def parse_history(text: str) -> list[PastJob]:
    """Parse the rows of `sacct --parsable2`. Return them oldest first."""
    return sorted(_rows(PastJob, "sacct", text), key=lambda job: job.submitted or 0)  # sacct does not sort


def parse_partitions(text: str) -> list[Partition]:
    """Parse the rows of `sinfo --format`: one for each kind of node in a partition."""
    found: dict[str, Partition] = {}
    for kind in _rows(Partition, "sinfo", text):
        other = found.get(kind.name)
        found[kind.name] = (
            kind
            if other is None
            else replace(
                other,
                nodes=other.nodes + kind.nodes,
                cpus_per_node=max(other.cpus_per_node, kind.cpus_per_node),
                memory_mb_per_node=max(other.memory_mb_per_node, kind.memory_mb_per_node),
                gpus_per_node=max(other.gpus_per_node, kind.gpus_per_node),
            )
        )
    return [*found.values()]


def parse_nodes(text: str) -> list[Node]:
    """Parse the rows of `sinfo --Node --format`."""
    return [*_rows(Node, "sinfo", text)]


def parse_configuration(text: str) -> Configuration:
    """Parse what `scontrol show config` prints."""
    return _build(Configuration, "scontrol show config", dict(re.findall(r"^(\w+) += (.*?) *$", text, re.M)))


def _rows(kind: type[T], program: str, text: str, end_of_row: str = "\n") -> Iterator[T]:
    names = columns(kind)
    for row in text.split(end_of_row)[:-1]:
        cells = row.split(END_OF_FIELD, len(names) - 1)
        if len(cells) < len(names):
            raise unexpected(program, row)
        yield _build(kind, program, dict(zip(names, cells, strict=True)))


def _build(kind: type[T], program: str, texts: Mapping[str, str], **own: str) -> T:
    columns_of = {each.name: each.metadata for each in fields(kind) if each.metadata}  # type: ignore[arg-type]  # T is any dataclass
    try:
        return kind(**own, **{name: each["read"](texts[each["column"]]) for name, each in columns_of.items()})
    except KeyError as missing:
        raise SlurmError(f"{program} prints no {missing.args[0]}") from None
