"""Read the environment that Slurm gives a task, and remove it from the environment of a job submitted from there."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.errors import SlurmError

# SLURM_INTERACTIVE_STEP in slurm.h: the shell that salloc starts on a node (LaunchParameters=use_interactive_step).
_INTERACTIVE_STEP = "4294967290"

# Set by Slurm, submitit, MPI or torchrun for one job. A job submitted from inside it would take them for its own:
# srun, for one, reads its options from SLURM_* (srun(1), INPUT ENVIRONMENT VARIABLES).
_JOB_VARIABLES = re.compile(
    r"(SLURM|SLURMD|SRUN|SBATCH|SALLOC|SUBMITIT|TORCHELASTIC|TORCH_ELASTIC)_.*|PMI\w*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT"
    r"|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)
_USER_VARIABLES = {"SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_WCKEY"}


@dataclass(frozen=True)
class Allocation:
    """This task's place in its srun step.

    `job_id` is for people, 120_3 in an array. Use `raw_job_id` in calls to Slurm: a job that was submitted from inside
    an array's task can inherit the array's variables. `restart_count` counts every requeue. `node_list` is as Slurm
    writes it, node[0-2]. `gpus` is the number allocated on this node, `cpus_per_task` what the job asked for, 0 if it
    did not.
    """

    job_id: str
    raw_job_id: str
    restart_count: int
    node_rank: int
    nnodes: int
    ntasks: int
    node_name: str
    node_list: str
    gpus: int
    cpus_per_task: int


def read_allocation(env: Mapping[str, str] | None = None) -> Allocation | None:
    """Return the Allocation that `env` (os.environ if None) describes; None if this is not a task of an srun step.

    The batch script and the shell of salloc, on a login or a compute node, are not tasks. A shell of `srun --pty` is.
    Raises SlurmError for variables that are missing, or not as Slurm sets them.
    """
    env = os.environ if env is None else env
    if not env.get("SLURM_JOB_ID") or env.get("SLURM_STEP_ID", _INTERACTIVE_STEP) == _INTERACTIVE_STEP:
        return None
    # Not set before a requeue, without GPUs, and without --cpus-per-task.
    env = {"SLURM_RESTART_COUNT": "0", "SLURM_GPUS_ON_NODE": "0", "SLURM_CPUS_PER_TASK": "0", **env}
    raw = str(_number(env, "SLURM_JOB_ID"))  # in an array, the id of this one task
    in_array = "SLURM_ARRAY_JOB_ID" in env
    allocation = Allocation(
        job_id=f"{_number(env, 'SLURM_ARRAY_JOB_ID')}_{_number(env, 'SLURM_ARRAY_TASK_ID')}" if in_array else raw,
        raw_job_id=raw,
        restart_count=_number(env, "SLURM_RESTART_COUNT"),
        node_rank=_number(env, "SLURM_NODEID"),
        nnodes=_number(env, "SLURM_STEP_NUM_NODES"),
        ntasks=_number(env, "SLURM_STEP_NUM_TASKS"),
        node_name=_nodes(env, "SLURMD_NODENAME"),
        node_list=_nodes(env, "SLURM_STEP_NODELIST"),
        gpus=_number(env, "SLURM_GPUS_ON_NODE"),
        cpus_per_task=_number(env, "SLURM_CPUS_PER_TASK"),
    )
    if not allocation.node_rank < allocation.nnodes <= allocation.ntasks:
        raise SlurmError(
            f"SLURM_NODEID={allocation.node_rank}, SLURM_STEP_NUM_NODES={allocation.nnodes} and "
            f"SLURM_STEP_NUM_TASKS={allocation.ntasks} contradict each other; start the tasks with srun"
        )
    return allocation


def task_process(env: Mapping[str, str] | None = None) -> int:
    """Return the process that slurmstepd started for this task, by `env` (os.environ if None).

    That is this one, or an ancestor: a shell or a container. This one too if no ancestor can be seen.
    """
    env = os.environ if env is None else env
    process: int | None = os.getpid()
    while process is not None and str(process) != env.get("SLURM_TASK_PID"):
        process = parent_of(process)
    return os.getpid() if process is None else process


def parent_of(process: int) -> int | None:
    """Return the parent of a process; None if it has none, is gone, or cannot be seen, as in a container or hidepid."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1]) or None  # proc(5): the parent follows the name and the state


def has_lost_slurmstepd(task: int, env: Mapping[str, str] | None = None) -> bool:
    """Return True if slurmstepd started `task`, by `env` (os.environ if None), and has ended since."""
    if (os.environ if env is None else env).get("SLURM_TASK_PID") != str(task):
        return False
    parent = parent_of(task)
    try:
        return parent == 1 or Path(f"/proc/{parent}/comm").read_text(encoding="utf-8") != "slurmstepd\n"
    except OSError:  # /proc mounted with hidepid: others' processes cannot be seen
        return False


def binding_gaps(
    allocation: Allocation, cpus_wanted: int, gpus_wanted: int, env: Mapping[str, str] | None = None
) -> list[str]:
    """Return one line for each resource of which this task may use less than was asked for on its node.

    CPUs are counted in the process's affinity mask, GPUs in CUDA_VISIBLE_DEVICES of `env` (os.environ if None).
    """
    visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")  # set by Slurm where it binds GPUs
    gpus = allocation.gpus if visible is None else len([device for device in visible.split(",") if device])
    resources = (("CPUs", len(os.sched_getaffinity(0)), cpus_wanted), ("GPUs", gpus, gpus_wanted))
    node = allocation.node_name
    return [
        f"{node}: {got} {name} for this task, {wanted} asked for; every rank here will be slower or fail"
        for name, got, wanted in resources
        if got < wanted
    ]


def take_part(allocation: Allocation, part: int, parts: int) -> Allocation:
    """Let this process, and those that it starts, use one of `parts` equal parts of the task's GPUs and CPUs.

    Return that part. GPUs keep the names that Slurm gave them. CPUs are chosen only where Slurm binds the task to the
    job's: elsewhere other jobs would choose the same. Raises SlurmError if CUDA_VISIBLE_DEVICES does not name the GPUs.
    """
    gpus, cpus = allocation.gpus // parts, allocation.cpus_per_task // parts
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = [device for device in visible.split(",") if device]
        if len(devices) < gpus * parts:
            raise SlurmError(
                f"{allocation.node_name}: CUDA_VISIBLE_DEVICES is {visible!r}, expected the job's {allocation.gpus} "
                "GPUs, to share them among its runs; ask the site to let Slurm set it, or leave out --pack"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[part * gpus : (part + 1) * gpus])
    allowed = sorted(os.sched_getaffinity(0), key=_core_of)
    on_node = _number({"SLURM_CPUS_ON_NODE": str(len(allowed)), **os.environ}, "SLURM_CPUS_ON_NODE")
    if parts <= len(allowed) <= on_node:
        os.sched_setaffinity(0, allowed[part * len(allowed) // parts : (part + 1) * len(allowed) // parts])
    return replace(allocation, gpus=gpus, cpus_per_task=cpus)


def _core_of(cpu: int) -> tuple[int, int]:
    """Return a key that sorts the hardware threads of a core beside each other."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    with suppress(OSError, ValueError):  # a container may hide /sys
        return int(re.split("[,-]", siblings.read_text(encoding="ascii"))[0]), cpu
    return cpu, cpu


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` for a job submitted from here: inside a job, without that job's own variables.

    SLURM_CONF and the user's SBATCH_ACCOUNT, SBATCH_PARTITION and SBATCH_QOS stay. Outside a job everything stays.
    """
    if "SLURM_JOB_ID" not in environ:  # RANK and others are then of the user
        return dict(environ)
    return {
        name: value for name, value in environ.items() if name in _USER_VARIABLES or not _JOB_VARIABLES.fullmatch(name)
    }


def _number(env: Mapping[str, str], name: str) -> int:
    return int(_checked(env, name, "[0-9]{1,10}", "a number"))


def _nodes(env: Mapping[str, str], name: str) -> str:
    return _checked(env, name, r"\w[\w.,\[\]-]*", "names of nodes")


def _checked(env: Mapping[str, str], name: str, pattern: str, expected: str) -> str:
    text = env.get(name)
    if text is None or not re.fullmatch(pattern, text, re.ASCII):
        found = "is not set" if text is None else f"is {text[:60]!r}"
        raise SlurmError(f"{name} {found} where Slurm sets {expected}; start this with srun, or outside of a job")
    return text
