"""What Slurm's programs print, as typed values; nothing is started here.

Times come as Unix seconds from Slurm itself (SLURM_TIME_FORMAT=%s): local times are ambiguous for an hour a year.
Fields end with the control character US, rows with RS; what a user may put anything into comes last. Any other text
raises SlurmError.
"""

import re

from slurm.errors import SlurmError
from slurm.types import Configuration, Partition, PastJob, QueuedJob, ShownJob

END_OF_FIELD, END_OF_ROW = "\x1f", "\x1e"
QUEUE_FIELDS = (
    "JobArrayID",
    "JobID",
    "State",
    "Reason",
    "Partition",
    "NodeList",
    "SubmitTime",
    "StartTime",
    "EndTime",
    "RestartCnt",
    "Name",
)
PARTITION_FIELDS = ("%R", "%P", "%a", "%D", "%s", "%l", "%c", "%m", "%G")
HISTORY_FIELDS = (
    "JobID",
    "JobIDRaw",
    "State",
    "Submit",
    "Start",
    "End",
    "NodeList",
    "Reason",
)

_NOTHING = {"", "(null)", "n/a", "none", "unknown", "unlimited", "infinite", "not_set", "partition_limit"}
_OF_NODES = {PARTITION_FIELDS.index(field) for field in ("%D", "%c", "%m", "%G")}
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}  # a start time is then an estimate


def parse_queue(text: str) -> list[QueuedJob]:
    """The rows of `squeue --Format` with QUEUE_FIELDS; `nodes` is left empty."""
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
    """The job `job_id` in what `scontrol show job` prints, several lines for each; None if it is not there.

    Of an array's tasks (the array's id is also the raw id of its last one) it is the task with this id.
    """
    for block in re.split(r"\n(?=JobId=)", text.strip()):
        # What a user may put anything into comes first (the name) and last (from the command on).
        shown = re.fullmatch(
            r"JobId=(\d+) (?:ArrayJobId=(\d+) ArrayTaskId=(\S+) )?(?:.*? )??JobName=(.*?)"
            r"\n   (UserId=.*?)\n   Command=.*",
            block,
            re.DOTALL,
        )
        if shown is None:
            raise _unexpected("scontrol show job", block)
        raw, array, task, name, said = shown.groups()
        written = f"{array}_{task}" if array else raw
        if job_id == raw or "_" in job_id:
            return _shown_job(job_id if "_" in job_id else written, raw, name, said)
    return None


def _shown_job(job_id: str, raw_job_id: str, name: str, said: str) -> ShownJob:
    fields = dict(re.findall(r"(\S+?)=(\S*)", said))
    try:
        exit_code, exit_signal = _exit(fields["ExitCode"])
        waits = fields["JobState"] in _WAITING
        return ShownJob(
            job_id=job_id,
            raw_job_id=raw_job_id,
            name=name,
            state=fields["JobState"],
            reason=_known(fields["Reason"]),
            restarts=_count(fields["Restarts"]),
            exit_code=exit_code,
            exit_signal=exit_signal,
            started=None if waits else _unix_time(fields["StartTime"]),
            ends=_unix_time(fields["EndTime"]),
            preempted=_unix_time(fields.get("PreemptTime", "")),
            node_list=_known(fields["NodeList"]) or "",
        )
    except KeyError as missing:
        raise SlurmError(f"scontrol show job {job_id} does not say {missing}") from None


def parse_history(text: str) -> list[PastJob]:
    """The rows of `sacct --parsable2` with HISTORY_FIELDS, oldest first."""
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
    """The rows of `sinfo --format` with PARTITION_FIELDS: one for each kind of node in a partition, put together."""
    kinds: dict[str, list[list[str]]] = {}
    for row in text.split("\n")[:-1]:
        fields = row.split(END_OF_FIELD)
        if len(fields) != len(PARTITION_FIELDS):
            raise _unexpected("sinfo", row)
        kinds.setdefault(fields[0], []).append(fields)
    return [_partition(rows) for rows in kinds.values()]


def _partition(rows: list[list[str]]) -> Partition:
    name, marked, state, _, job_nodes, max_time, *_ = rows[0]
    most = job_nodes.rpartition("-")[2]  # "1-infinite", "2-4" or "1"
    nodes, cpus, memory, gres = (column for i, column in enumerate(zip(*rows, strict=True)) if i in _OF_NODES)
    return Partition(
        name=name,
        is_default=marked.endswith("*"),
        state=state,
        nodes=sum(map(_count, nodes)),
        max_nodes_per_job=None if _known(most) is None else _count(most),
        max_time_s=parse_duration_s(max_time),
        cpus_per_node=max(map(_count, cpus)),
        memory_mb_per_node=max(map(_count, memory)),
        gpus_per_node=max(map(_gpus, gres)),
    )


def parse_configuration(text: str) -> Configuration:
    """What `scontrol show config` prints."""
    said = dict(re.findall(r"^(\w+) += (.*?) *$", text, re.M))
    try:
        return Configuration(
            version=said["SLURM_VERSION"],
            accounting=said["AccountingStorageType"] not in ("accounting_storage/none", "(null)"),
            kill_wait_s=_count(said["KillWait"].removesuffix(" sec")),
            min_job_age_s=_count(said["MinJobAge"].removesuffix(" sec")),
            preempt_modes=tuple(said["PreemptMode"].split(",")),
        )
    except KeyError as missing:
        raise SlurmError(f"scontrol show config says no {missing.args[0]}") from None


def parse_duration_s(text: str) -> int | None:
    """Seconds of a time as squeue and sinfo print it, [[days-]hours:]minutes:seconds; None: no limit."""
    if _known(text) is None:
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        raise _unexpected("a time limit", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _exit(text: str) -> tuple[int, int]:
    """Exit code and signal of "0:15"."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise _unexpected("an exit code", text)
    return int(found[1]), int(found[2])


def _gpus(gres: str) -> int:
    """GPUs in "gpu:a100:2(S:0-1),gpu:v100:1,tmp:50": 3."""
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
