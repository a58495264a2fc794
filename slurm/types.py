"""Typed values of what Slurm reports. Times are Unix seconds; None means unknown or unlimited."""

from dataclasses import dataclass

# Job states as squeue and sacct print them, by https://slurm.schedmd.com/job_state_codes.html
WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
TERMINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. `job_id` is what people write, 120_3 for an array's task; `raw_job_id` is Slurm's own.

    While the job waits, `started` is None and `expected_start` is the scheduler's estimate. `ends` is the end by the
    time limit. `nodes` are host names, empty while it waits.
    """

    job_id: str
    raw_job_id: str
    name: str
    state: str
    reason: str | None
    partition: str
    node_list: str
    submitted: int | None
    started: int | None
    expected_start: int | None
    ends: int | None
    restarts: int
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
    state: str
    reason: str | None
    restarts: int
    exit_code: int
    exit_signal: int
    started: int | None
    ends: int | None
    preempted: int | None
    node_list: str


@dataclass(frozen=True)
class PastJob:
    """A record of accounting. A job that was requeued has one for each start, each with its own end."""

    job_id: str
    raw_job_id: str
    state: str
    submitted: int | None
    started: int | None
    ended: int | None
    node_list: str
    reason: str | None


@dataclass(frozen=True)
class Partition:
    """A partition that the user may see. Sizes are those of its largest node; None: no limit."""

    name: str
    is_default: bool
    state: str
    nodes: int
    max_nodes_per_job: int | None
    max_time_s: int | None
    cpus_per_node: int
    memory_mb_per_node: int
    gpus_per_node: int


@dataclass(frozen=True)
class Configuration:
    """The settings of slurm.conf that matter here.

    `kill_wait_s` is the time between TERM and KILL, `min_job_age_s` how long slurmctld remembers a job that has ended.
    A partition can override `preempt_modes`.
    """

    version: str
    accounting: bool
    kill_wait_s: int
    min_job_age_s: int
    preempt_modes: tuple[str, ...]
