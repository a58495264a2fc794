"""Parse what Slurm's programs print. Any text of another form raises SlurmError.

Times are Unix seconds (SLURM_TIME_FORMAT=%s): local times are ambiguous for an hour a year. Fields end with the control
character US and rows with RS, which no field but a job's name can contain. JSON output would be simpler, but squeue and
sacct print it only where Slurm was built with the plugin, and its keys change between versions.
"""

import re

from slurm.errors import SlurmError
from slurm.types import Configuration, Partition, PastJob, QueuedJob, ShownJob

END_OF_FIELD, END_OF_ROW = "\x1f", "\x1e"
# squeue(1), --Format; sinfo(1), --format; sacct(1), --format. The job's name may hold any character: it comes last.
QUEUE_FIELDS = (
    *("JobArrayID", "JobID", "State", "Reason", "Partition", "NodeList"),
    *("SubmitTime", "StartTime", "EndTime", "RestartCnt", "Name"),
)
PARTITION_FIELDS = ("%R", "%P", "%a", "%D", "%s", "%l", "%c", "%m", "%G")
HISTORY_FIELDS = ("JobID", "JobIDRaw", "State", "Submit", "Start", "End", "NodeList", "Reason")

# How the programs write "unknown" and "unlimited", which differs between them and between fields.
_NOTHING = {"", "(null)", "n/a", "none", "unknown", "unlimited", "infinite", "not_set", "partition_limit"}
_NODE_COLUMNS = {PARTITION_FIELDS.index(field) for field in ("%D", "%c", "%m", "%G")}
# In these states StartTime is the scheduler's estimate.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}


def parse_queue(text: str) -> list[QueuedJob]:
    """Parse the rows of `squeue --Format` with QUEUE_FIELDS. `nodes` is left empty."""
    jobs = []
    for row in text.split(END_OF_ROW + "\n")[:-1]:
        fields = row.split(END_OF_FIELD, len(QUEUE_FIELDS) - 1)
        if len(fields) < len(QUEUE_FIELDS):
            raise _unexpected("squeue", row)
        job_id, raw, state, reason, partition, node_list, *times, restarts, name = fields
        submitted, start, ends = (_unix_time(field) for field in times)
        waits = state in _WAITING
        jobs.append(
            QueuedJob(
                job_id=job_id,
                raw_job_id=raw,
                name=name,
                state=state,
                reason=_known(reason),
                partition=partition,
                node_list=_known(node_list) or "",
                submitted=submitted,
                started=None if waits else start,
                expected_start=start if waits else None,
                ends=ends,
                restarts=_count(restarts),
            )
        )
    return jobs


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
            raise _unexpected("scontrol show job", block)
        raw, array, task, name, details = shown.groups()
        if "_" in job_id:
            return _shown_job(job_id, raw, name, details)
        if job_id == raw:
            return _shown_job(f"{array}_{task}" if array else raw, raw, name, details)
    return None


def _shown_job(job_id: str, raw_job_id: str, name: str, details: str) -> ShownJob:
    fields = dict(re.findall(r"(\S+?)=(\S*)", details))
    try:
        exit_code, _, exit_signal = fields["ExitCode"].partition(":")  # "0:15"
        waits = fields["JobState"] in _WAITING
        return ShownJob(
            job_id=job_id,
            raw_job_id=raw_job_id,
            name=name,
            state=fields["JobState"],
            reason=_known(fields["Reason"]),
            restarts=_count(fields["Restarts"]),
            exit_code=_count(exit_code),
            exit_signal=_count(exit_signal),
            started=None if waits else _unix_time(fields["StartTime"]),
            ends=_unix_time(fields["EndTime"]),
            preempted=_unix_time(fields.get("PreemptTime", "")),
            node_list=_known(fields["NodeList"]) or "",
        )
    except KeyError as missing:
        raise SlurmError(f"scontrol show job {job_id} prints no {missing.args[0]}") from None


def parse_history(text: str) -> list[PastJob]:
    """Parse the rows of `sacct --parsable2` with HISTORY_FIELDS. Return them oldest first."""
    jobs = []
    for row in text.split("\n")[:-1]:
        fields = row.split(END_OF_FIELD)
        if len(fields) != len(HISTORY_FIELDS):
            raise _unexpected("sacct", row)
        job_id, raw, state, submit, start, end, node_list, reason = fields
        jobs.append(
            PastJob(
                job_id=job_id,
                raw_job_id=raw,
                state=state.split(" ")[0],  # "CANCELLED by 1000"
                submitted=_unix_time(submit),
                started=_unix_time(start),
                ended=_unix_time(end),
                node_list="" if node_list == "None assigned" else node_list,
                reason=_known(reason),
            )
        )
    return sorted(jobs, key=lambda job: job.submitted or 0)


def parse_partitions(text: str) -> list[Partition]:
    """Parse the rows of `sinfo --format` with PARTITION_FIELDS: one for each kind of node in a partition."""
    kinds: dict[str, list[list[str]]] = {}
    for row in text.split("\n")[:-1]:
        fields = row.split(END_OF_FIELD)
        if len(fields) != len(PARTITION_FIELDS):
            raise _unexpected("sinfo", row)
        kinds.setdefault(fields[0], []).append(fields)
    return [_partition(rows) for rows in kinds.values()]


def _partition(rows: list[list[str]]) -> Partition:
    name, marked_name, state, _, job_size, max_time, *_ = rows[0]
    max_nodes = job_size.rpartition("-")[2]  # "1-infinite", "2-4" or "1"
    nodes, cpus, memory, gres = (column for i, column in enumerate(zip(*rows, strict=True)) if i in _NODE_COLUMNS)
    return Partition(
        name=name,
        is_default=marked_name.endswith("*"),
        state=state,
        nodes=sum(map(_count, nodes)),
        max_nodes_per_job=None if _known(max_nodes) is None else _count(max_nodes),
        max_time_s=parse_duration_s(max_time),
        cpus_per_node=max(map(_count, cpus)),
        memory_mb_per_node=max(map(_count, memory)),
        gpus_per_node=max(map(_gpus, gres)),
    )


def parse_configuration(text: str) -> Configuration:
    """Parse what `scontrol show config` prints."""
    settings = dict(re.findall(r"^(\w+) += (.*?) *$", text, re.M))
    try:
        return Configuration(
            version=settings["SLURM_VERSION"],
            accounting=settings["AccountingStorageType"] not in ("accounting_storage/none", "(null)"),
            kill_wait_s=_count(settings["KillWait"].removesuffix(" sec")),
            min_job_age_s=_count(settings["MinJobAge"].removesuffix(" sec")),
            preempt_modes=tuple(settings["PreemptMode"].split(",")),
        )
    except KeyError as missing:
        raise SlurmError(f"scontrol show config prints no {missing.args[0]}") from None


def parse_duration_s(text: str) -> int | None:
    """Return the seconds of a time as sinfo prints it, [[days-]hours:]minutes:seconds; None: no limit."""
    if _known(text) is None:
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        raise _unexpected("a time limit", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _gpus(gres: str) -> int:
    """Count the GPUs of a node: 3 in "gpu:a100:2(S:0-1),gpu:v100:1,tmp:50"."""
    gres = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", gres))


def _known(text: str) -> str | None:
    return None if text.lower() in _NOTHING else text


def _unix_time(text: str) -> int | None:
    return None if _known(text) is None else _count(text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise _unexpected("a number", text)
    return int(text)


def _unexpected(what: str, text: str) -> SlurmError:
    return SlurmError(f"{what}: {text[:100]!r} is not what a Slurm of 22.05 to 25.x prints")
