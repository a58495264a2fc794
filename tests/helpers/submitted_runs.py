"""Submit runs to a private Slurm, as README describes, and find the processes of their jobs."""

import json
import os
import subprocess
import sys

from fnet_dist.run.run_dir import RunDir
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun
from slurm.job_env import parent_of
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.processes import processes
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import process_name, title

# 120 steps an epoch, of about 10 ms on two ranks; a checkpoint every 20 steps.
JOB = ["jobs/quickstart.toml", "--data.global-batch-size", "500", "--run.epochs", "1000", "--run.max-steps", "480"]
JOB += ["--data.dataset", "fashion-mnist" if "FNET_DATA" in os.environ else "synthetic"]
JOB += ["--checkpoint.every-steps", "20", "--tracking.wandb", "disabled"]


def jobs(*words: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fnet WORDS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def changed(job: list[str], option: str, value: str) -> list[str]:
    """Return `job` with another value of an option that it has."""
    at = job.index(option) + 1
    return [*job[:at], value, *job[at + 1 :]]


def place(run: RunDir) -> list[str]:
    """Return the options that name a run's directory."""
    return ["--run.root", str(run.path.parent), "--run.name", run.name]


def submit(run: RunDir, *options: str, job: list[str] = JOB) -> SupervisedSlurmRun:
    """Run `fnet submit`, on two nodes unless `options` say otherwise."""
    sizes = [] if {"-N", "--nodes"} & {*options} else ["-N", "2"]
    ended = jobs("submit", *job, *place(run), *sizes, *options, "--json")
    assert ended.returncode == 0, ended.stderr
    return SupervisedSlurmRun(run, json.loads(ended.stdout)["job_id"])


def ranks_on(cluster: LocalCluster, node: str, run: RunDir) -> list[int]:
    """Return the pids of the ranks of `run` on `node`."""
    return [
        pid
        for pid in processes(cluster.directory, node)
        if f"-m fnet_dist.train --config {run.config}" in " ".join(title(pid))
        and process_name(pid).startswith("rank ")  # not the fork server
    ]


def launcher_of(cluster: LocalCluster, node: str, run: RunDir) -> int:
    """Return the pid of the process on `node` that started the ranks of `run`."""
    parent = parent_of(ranks_on(cluster, node, run)[0])
    assert parent is not None, "it has ended"
    return parent
