"""A task reads its allocation from the environment of Slurm 22.05.8; a job submitted from it inherits none of it."""

import os
import subprocess
import sys

import pytest

from slurm.errors import SlurmError
from slurm.job_env import Allocation, binding_gaps, clean_environment, read_allocation

BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURMD_NODENAME": "node0",
}
SALLOC = {"SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[0-1]",
}
TASK = BATCH | STEP | {"SLURM_NODEID": "1", "SLURMD_NODENAME": "node1"}
ARRAY = TASK | {"SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "3"}


def test_a_task_of_srun_has_an_allocation():
    assert read_allocation(TASK) == Allocation("2", "2", 0, 1, 2, 2, "node1", "node[0-1]", 2, 0)


def test_an_array_task_has_the_id_that_people_write():
    allocation = read_allocation(ARRAY)
    assert allocation is not None
    assert (allocation.job_id, allocation.raw_job_id, allocation.restart_count) == ("2_4", "2", 3)


@pytest.mark.parametrize(
    "env", [{}, BATCH, SALLOC, TASK | {"SLURM_STEP_ID": "4294967290"}], ids=["none", "batch", "salloc", "interactive"]
)
def test_outside_of_srun_there_is_no_allocation(env):
    assert read_allocation(env) is None


NUMBERS = ["SLURM_NODEID", "SLURM_GPUS_ON_NODE", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"]
NUMBERS += ["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"]
NODES = ["SLURMD_NODENAME", "SLURM_STEP_NODELIST"]
HOSTILE = ["-1", " ", "1\n2", "$(id)", "\u0661", "1" * 11 + ";"]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS + NODES for value in HOSTILE])
def test_a_hostile_value_is_refused_in_one_line(name, value):
    with pytest.raises(SlurmError, match=f"^{name} is .*; start this with srun, or outside of a job$"):
        read_allocation({**ARRAY, name: value})


@pytest.mark.parametrize("name", [*NODES, "SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_ARRAY_TASK_ID"])
def test_a_half_set_environment_is_refused(name):
    with pytest.raises(SlurmError, match=f"^{name} is not set where Slurm sets"):
        read_allocation({other: value for other, value in ARRAY.items() if other != name})


def test_numbers_that_contradict_each_other_are_refused():
    with pytest.raises(SlurmError, match="contradict"):
        read_allocation(TASK | {"SLURM_NODEID": "2"})


def test_a_binding_smaller_than_asked_for_is_reported_with_the_node():
    allocation = read_allocation(TASK)
    assert allocation is not None
    cpus = len(os.sched_getaffinity(0))
    assert binding_gaps(allocation, cpus, 2, {}) == []
    lines = binding_gaps(allocation, cpus + 1, 2, {"CUDA_VISIBLE_DEVICES": "1"})
    assert read_allocation({**TASK, "SLURM_CPUS_PER_TASK": "8"}).cpus_per_task == 8
    assert [line.partition(";")[0] for line in lines] == [
        f"node1: {cpus} CPUs for this task, {cpus + 1} asked for",
        "node1: 1 GPUs for this task, 2 asked for",
    ]


def test_inside_a_job_its_variables_do_not_reach_the_next_job():
    kept = {"SLURM_CONF": "c", "SBATCH_ACCOUNT": "a", "SBATCH_PARTITION": "p", "SBATCH_QOS": "q", "HOME": "h"}
    kept |= {"WANDB_API_KEY": "k", "FNET_DATA": "d", "OMP_NUM_THREADS": "1"}
    removed = ["SBATCH_TIMELIMIT", "SRUN_DEBUG", "SALLOC_X", "PMI_RANK", "PMI2_JOBID", "PMIX_ID", "SUBMITIT_EXECUTOR"]
    removed += [
        "SLURMD_NODENAME",
        "SLURM_CPU_BIND",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
    ]
    removed += ["ROLE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"]
    assert clean_environment(ARRAY | kept | dict.fromkeys(removed, "x")) == kept


def test_outside_of_a_job_all_variables_stay():
    variables = {"SBATCH_TIMELIMIT": "10", "SLURM_CLUSTERS": "a", "CUDA_VISIBLE_DEVICES": "0", "RANK": "0"}
    assert clean_environment(variables) == variables


PARENT = """
import os, pathlib, sys
pathlib.Path("/proc/self/comm").write_text(sys.argv[1])
task = os.fork()
if task == 0:
    task, in_container = os.getpid(), os.fork()
    if in_container == 0:
        from slurm.job_env import has_lost_slurmstepd, task_process
        env = {"SLURM_TASK_PID": str(task)}
        print(task_process(env) == task, has_lost_slurmstepd(task, env))
        print(task_process({}) == os.getpid(), has_lost_slurmstepd(os.getpid(), env))
    os.waitpid(in_container, 0) if in_container else None
else:
    os.waitpid(task, 0)
"""


@pytest.mark.parametrize(("parent", "lost"), [("slurmstepd", False), ("systemd", True)])
def test_a_task_knows_that_its_slurmstepd_ended_before_it_could_watch_it(repository, parent, lost):
    """Also in a shell or a container, which slurmstepd has started."""
    command = [sys.executable, "-c", PARENT, parent]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=30)
    assert ended.stdout == f"True {lost}\nTrue False\n"


PART = """
import os, sys
from slurm.job_env import read_allocation, take_part
part = take_part(read_allocation(), int(sys.argv[1]), 2)
print(part.gpus, part.cpus_per_task, os.environ["CUDA_VISIBLE_DEVICES"], *sorted(os.sched_getaffinity(0)))
"""


def parts_of(**environment: str) -> list[list[str]]:
    """Return what each of two parts of a task with four GPUs prints."""
    task = {**TASK, "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "6", **environment}
    ended = [
        subprocess.run(
            [sys.executable, "-c", PART, str(part)],
            env={**os.environ, **task},
            capture_output=True,
            text=True,
            timeout=30,
        )
        for part in range(2)
    ]
    return [(each.stdout or each.stderr.splitlines()[-1]).split() for each in ended]


def test_each_part_of_a_task_has_gpus_by_their_names_and_cpus_of_its_own():
    cores = sorted(map(str, os.sched_getaffinity(0)))
    first, second = parts_of(CUDA_VISIBLE_DEVICES="5,GPU-a,0,3", SLURM_CPUS_ON_NODE=str(len(cores)))
    assert (first[:3], second[:3]) == (["2", "3", "5,GPU-a"], ["2", "3", "0,3"])
    if len(cores) > 1:
        assert sorted(first[3:] + second[3:]) == cores, "each is in one part"
        assert len(first[3:]) - len(second[3:]) in (0, -1)


def test_where_slurm_does_not_bind_cpus_none_are_chosen_and_without_its_gpus_a_part_is_refused():
    cores = sorted(map(str, os.sched_getaffinity(0)))
    for part in parts_of(CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_CPUS_ON_NODE=str(len(cores) - 1)):
        assert sorted(part[3:]) == cores
    said = "node1: CUDA_VISIBLE_DEVICES is '0', expected the job's 4 GPUs, to share them among its runs; ask the site"
    for part in parts_of(CUDA_VISIBLE_DEVICES="0"):
        assert said in " ".join(part)
