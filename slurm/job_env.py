"""What Slurm tells a task in its environment, and how that is kept from the next job."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from slurm.errors import SlurmError

_INTERACTIVE_STEP = "4294967290"  # the shell that salloc starts on a node (LaunchParameters=use_interactive_step)

# What belongs to a job, or to a launcher inside it, and would be taken for the next one's.
_OF_A_JOB = re.compile(
    r"(SLURM|SLURMD|SRUN|SBATCH|SALLOC|SUBMITIT|TORCHELASTIC|TORCH_ELASTIC)_.*|PMI\w*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT"
    r"|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)
_OF_THE_USER = {"SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS"}


@dataclass(frozen=True)
class Allocation:
    """This task among the tasks of its srun step.

    `job_id` is for people, 120_3 in an array; ask and command Slurm by `raw_job_id`: in a job that was submitted from
    inside an array's task, with no care for its environment, the array's variables are still there. `restart_count`
    counts every requeue. Lists of nodes are as Slurm writes them, node[0-2]. `gpus` is the number that the node gives.
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


def read_allocation(env: Mapping[str, str] | None = None) -> Allocation | None:
    """The Allocation that `env` (`os.environ` if None) describes; None where this is no task of an srun step.

    The batch script, and the shell of salloc on the login node or on a compute node, are no tasks. A shell of
    `srun --pty` is one. Raises SlurmError for variables that are missing, or not Slurm's.
    """
    env = os.environ if env is None else env
    if not env.get("SLURM_JOB_ID") or env.get("SLURM_STEP_ID", _INTERACTIVE_STEP) == _INTERACTIVE_STEP:
        return None
    raw = str(_number(env, "SLURM_JOB_ID"))
    in_array = "SLURM_ARRAY_JOB_ID" in env
    allocation = Allocation(
        job_id=f"{_number(env, 'SLURM_ARRAY_JOB_ID')}_{_number(env, 'SLURM_ARRAY_TASK_ID')}" if in_array else raw,
        raw_job_id=raw,
        restart_count=_number(env, "SLURM_RESTART_COUNT", 0),
        node_rank=_number(env, "SLURM_NODEID"),
        nnodes=_number(env, "SLURM_STEP_NUM_NODES"),
        ntasks=_number(env, "SLURM_STEP_NUM_TASKS"),
        node_name=_nodes(env, "SLURMD_NODENAME"),
        node_list=_nodes(env, "SLURM_STEP_NODELIST"),
        gpus=_number(env, "SLURM_GPUS_ON_NODE", 0),
    )
    if not allocation.node_rank < allocation.nnodes <= allocation.ntasks:
        raise SlurmError(
            f"SLURM_NODEID={allocation.node_rank}, SLURM_STEP_NUM_NODES={allocation.nnodes} and "
            f"SLURM_STEP_NUM_TASKS={allocation.ntasks} contradict each other; start the tasks with srun"
        )
    return allocation


def binding_gaps(
    allocation: Allocation, cpus_asked: int, gpus_asked: int, env: Mapping[str, str] | None = None
) -> list[str]:
    """One line for each resource of which this task may use less than was asked for on its node.

    CPUs are those that the process may run on, GPUs those that `env` (`os.environ` if None) shows to it.
    """
    visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    gpus = allocation.gpus if visible is None else len([device for device in visible.split(",") if device])
    bound = (("CPUs", len(os.sched_getaffinity(0)), cpus_asked), ("GPUs", gpus, gpus_asked))
    return [
        f"{allocation.node_name}: {got} {what} for this task, {asked} asked for; every rank here will be slower or fail"
        for what, got, asked in bound
        if got < asked
    ]


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a job submitted from here may see of `environ`: inside a job, nothing that speaks of that job.

    SLURM_CONF and the user's SBATCH_ACCOUNT, SBATCH_PARTITION and SBATCH_QOS always stay; outside a job all does.
    """
    if "SLURM_JOB_ID" not in environ:
        return dict(environ)
    return {name: value for name, value in environ.items() if name in _OF_THE_USER or not _OF_A_JOB.fullmatch(name)}


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,10}", text):
        raise _bad(name, text, "a number")
    return int(text)


def _nodes(env: Mapping[str, str], name: str) -> str:
    text = env.get(name)
    if text is None or not re.fullmatch(r"\w[\w.,\[\]-]*", text, re.ASCII):
        raise _bad(name, text, "names of nodes")
    return text


def _bad(name: str, text: str | None, expected: str) -> SlurmError:
    found = "is not set" if text is None else f"is {text[:60]!r}"
    return SlurmError(f"{name} {found} where Slurm sets {expected}; start this with srun, or outside of a job")
