"""Typed values of what Slurm reports. Times are Unix seconds; None means unknown or unlimited.

Each field names the column of the program's output that it is read from, and the function that reads it.
"""

from dataclasses import dataclass

from slurm.values import column, count, duration_s, gpus, known, known_count, known_or_empty

# Job states as squeue and sacct print them, by https://slurm.schedmd.com/job_state_codes.html
WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
TERMINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs; the columns are those of squeue(1), --Format.

    `job_id` is what people write, 120_3 for an array's task; `raw_job_id` is Slurm's own. While the job waits,
    `started` is None and `expected_start` is the scheduler's estimate. `ends` is the end by the time limit. `nodes` are
    host names, empty while it waits.
    """

    job_id: str = column("JobArrayID")
    raw_job_id: str = column("JobID")
    state: str = column("State")
    reason: str | None = column("Reason", known)
    partition: str = column("Partition")
    node_list: str = column("NodeList", known_or_empty)
    submitted: int | None = column("SubmitTime", known_count)
    started: int | None = column("StartTime", known_count)
    ends: int | None = column("EndTime", known_count)
    restarts: int = column("RestartCnt", count)
    name: str = column("Name")  # the last column: it may hold any character, END_OF_FIELD too
    expected_start: int | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownJob:
    """A job in the memory of slurmctld: while it waits and runs, and for MinJobAge after its end.

    `restarts` counts every requeue, from the moment it is requested. `ends` is the end by the time limit until the job
    has ended. The batch script ended with `exit_code` or by `exit_signal`; the other one is 0.
    """

    job_id: str
    raw_job_id: str
    name: str
    state: str = column("JobState")
    reason: str | None = column("Reason", known)
    restarts: int = column("Restarts", count)
    exit_code: int = column("ExitCode", lambda text: count(text.partition(":")[0]))  # "0:15"
    exit_signal: int = column("ExitCode", lambda text: count(text.partition(":")[2]))
    started: int | None = column("StartTime", known_count)
    ends: int | None = column("EndTime", known_count)
    preempted: int | None = column("PreemptTime", known_count)
    node_list: str = column("NodeList", known_or_empty)
    partition: str = column("Partition")
    required: str = column("ReqNodeList", known_or_empty)  # as Slurm writes nodes
    excluded: str = column("ExcNodeList", known_or_empty)
    requeue: bool = column("Requeue", lambda text: text != "0")
    is_batch: bool = column("BatchFlag", lambda text: text != "0")  # not by salloc: those are never requeued


@dataclass(frozen=True)
class PastJob:
    """A record of accounting. A job that was requeued has one for each start, each with its own end."""

    job_id: str = column("JobID")
    raw_job_id: str = column("JobIDRaw")
    state: str = column("State", lambda text: text.partition(" ")[0])  # "CANCELLED by 1000"
    submitted: int | None = column("Submit", known_count)
    started: int | None = column("Start", known_count)
    ended: int | None = column("End", known_count)
    node_list: str = column("NodeList", known_or_empty)
    reason: str | None = column("Reason", known)


@dataclass(frozen=True)
class Node:
    """A node of a partition, by sinfo(1), --Node --format."""

    name: str = column("%N")
    state: str = column("%T")
    features: str = column("%f")
    gres: str = column("%G")
    cpus: int = column("%c", count)
    memory_mb: int = column("%m", count)

    @property
    def is_usable(self) -> bool:
        """True if jobs run on it, or can."""
        # Flags after the state: ~ and # can be powered up, - is planned for a job. With others, as *, it takes no job.
        return self.state.rstrip("~#-") in ("idle", "mixed", "allocated", "completing", "planned", "reserved")

    def can_replace(self, other: "Node") -> bool:
        """Return True if a job that runs on `other` can run here, whichever of its features and GPUs it needs."""
        alike = (self.features, self.gres) == (other.features, other.gres)
        return self.is_usable and alike and self.cpus >= other.cpus and self.memory_mb >= other.memory_mb


@dataclass(frozen=True)
class Partition:
    """A partition that the user may see, by sinfo(1), --format. Sizes are those of its largest node; None: no limit."""

    name: str = column("%R")
    is_default: bool = column("%P", lambda text: text.endswith("*"))
    state: str = column("%a")
    nodes: int = column("%D", count)
    max_nodes_per_job: int | None = column("%s", lambda text: known_count(text.rpartition("-")[2]))  # "1-4" or "1"
    max_time_s: int | None = column("%l", duration_s)
    cpus_per_node: int = column("%c", count)
    memory_mb_per_node: int = column("%m", count)
    gpus_per_node: int = column("%G", gpus)


@dataclass(frozen=True)
class Configuration:
    """The settings of slurm.conf that matter here.

    `kill_wait_s` is the time between TERM and KILL, `min_job_age_s` how long slurmctld remembers a job that has ended.
    A partition can override `preempt_modes`.
    """

    version: str = column("SLURM_VERSION")
    accounting: bool = column("AccountingStorageType", lambda text: text not in ("accounting_storage/none", "(null)"))
    kill_wait_s: int = column("KillWait", lambda text: count(text.removesuffix(" sec")))
    min_job_age_s: int = column("MinJobAge", lambda text: count(text.removesuffix(" sec")))
    preempt_modes: tuple[str, ...] = column("PreemptMode", lambda text: tuple(text.split(",")))
