"""What Slurm answers, typed: times are Unix seconds, None is what Slurm does not know or does not limit."""

from dataclasses import dataclass

# Job states as squeue and sacct print them, by https://slurm.schedmd.com/job_state_codes.html
WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
TERMINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. `job_id` is what people write, 120_3 for an array's task; `raw_job_id` Slurm's own.

    While the job waits, `started` is None and `expected_start` what the scheduler reckons. `ends` is the end by the
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
    """A job as slurmctld remembers it: while it waits and runs, and for MinJobAge after its end.

    `restarts` counts every requeue, from the moment that it is asked for. `ends` is the end by the time limit until
    there is an end. `exit_code` or `exit_signal` is 0 where the other says how the batch script ended.
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
    """One record of accounting: a job that was requeued has one for each of its starts, each with its own end."""

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
    """A partition that the user sees. Sizes are those of its largest node; None: no limit."""

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
    """What matters here of slurm.conf. `kill_wait_s` is the time between TERM and KILL, `min_job_age_s` how long
    slurmctld remembers a job that has ended; `preempt_modes` are the cluster's, which a partition may change."""

    version: str
    accounting: bool
    kill_wait_s: int
    min_job_age_s: int
    preempt_modes: tuple[str, ...]
