"""What a cluster is, as Slurm says: whether it answers, its partitions, what becomes of a job that is preempted."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.doctor.python_env import ROOT
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.submission.preflight import not_shared
from slurm import client
from slurm.errors import SlurmError
from slurm.site_config import first_site, site_path
from slurm.types import Configuration, Partition

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel", "sacct")
SHOWN = 6
LEAST_KILL_WAIT_S = 5
PREEMPTED = {
    "OFF": "Slurm preempts no job",
    "REQUEUE": "a preempted run starts again by itself",
    "CANCEL": "a preempted run ends",
    "SUSPEND": "a preempted run is suspended, and its GPUs' memory stays taken",
}


@dataclass(frozen=True)
class Cluster:
    """What Slurm says of itself."""

    configuration: Configuration
    partitions: Sequence[Partition]


def ask_slurm() -> Cluster | Check:
    """What Slurm says, or the check that it fails; OK where a machine has no Slurm at all, and need not."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if len(missing) == len(PROGRAMS):
        return Check("Slurm", OK, "not on this machine; `jobs run` goes without, `jobs submit` does not")
    if missing:
        return Check("Slurm", MISS, f"not on the PATH: {', '.join(missing)}", "Slurm's client programs (slurm-client)")
    try:
        return Cluster(client.configuration(), client.partitions())
    except SlurmError as error:
        if client.NO_CLUSTER in str(error):
            found = "its programs are here, but they know no cluster; `jobs run` goes without"
            return Check("Slurm", WARN, found, "to submit, SLURM_CONF; to try, `python -m jobs cluster up`")
        return Check("Slurm", MISS, str(error), "scontrol ping; SLURM_CONF; munge; or ask the site")


def controller(cluster: Cluster) -> Check:
    """That slurmctld answers, and what is known of a job that has ended."""
    said = cluster.configuration
    forgets = f"accounting off: how a job ended is known for {said.min_job_age_s} s"
    known = "accounting on" if said.accounting else forgets
    return Check("Slurm", OK, f"{said.version}, {known}")


def partitions(cluster: Cluster, asked: str | None) -> Check:
    """Whether there is a partition to submit to: `asked` (several by commas), else the default."""
    there = cluster.partitions
    names = asked.split(",") if asked else [partition.name for partition in there if partition.is_default]
    listed = "; ".join(map(_show, there[:SHOWN])) + (f"; {len(there) - SHOWN} more" if len(there) > SHOWN else "")
    fix = "`partition` in slurm/site.toml, or -p"
    if not names:
        return Check("partitions", WARN, f"none is the default: {listed}", fix)
    if unknown := [name for name in names if name not in {partition.name for partition in there}]:
        return Check("partitions", MISS, f"{unknown[0]!r} is none of {listed}", fix)
    if all(partition.state != "up" for partition in there if partition.name in names):
        return Check("partitions", MISS, f"{', '.join(names)} takes no jobs now: {listed}", f"{fix}; or ask the site")
    return Check("partitions", OK, listed)


def preemption(cluster: Cluster) -> Check:
    """What becomes of a preempted run, and how long it has for its save: KillWait, from TERM to KILL."""
    said = cluster.configuration
    mode = next((mode for mode in said.preempt_modes if mode in PREEMPTED), "OFF")
    found = f"PreemptMode {mode}: {PREEMPTED[mode]}; KillWait: {said.kill_wait_s} s for a save after TERM"
    if said.kill_wait_s < LEAST_KILL_WAIT_S:
        return Check("preemption", WARN, found, "save often: --checkpoint.every-steps")
    if mode == "CANCEL":
        return Check("preemption", WARN, found, "the same `submit` goes on")
    if mode == "SUSPEND":
        return Check("preemption", WARN, found, "a partition that requeues, or none that is preempted")
    return Check("preemption", OK, found)


def shared(root: Path, shared_root: str | None) -> Check:
    """Whether the nodes may see the runs: what only this machine sees they do not, unless they are on it."""
    try:
        wrong = not_shared(root, shared_root)
    except SlurmError as error:
        return Check("shared", WARN, f"not known: {error}", "run doctor again")
    if wrong is None:
        return Check("shared", OK, f"nothing speaks against nodes seeing {root}; doctor --cluster tries it")
    found, _, fix = wrong.partition("; ")
    return Check("shared", MISS, found, fix)


def site(cluster: Cluster, path: Path | None = None) -> Check:
    """slurm/site.toml; a first one is written from what sinfo says where there is none."""
    path, example = path or site_path(), ROOT / "slurm" / "site.example.toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(first_site(cluster.partitions, example.read_text(encoding="utf-8")))
    except FileExistsError:
        return Check("site", OK, f"{path.name} is there, and stays as it is")
    except OSError as error:
        return Check(
            "site", WARN, f"{path} cannot be written: {error.strerror}", f"write it by hand, as {example.name}"
        )
    return Check("site", OK, f"{path} was written, from what sinfo says: look at it")


def _show(partition: Partition) -> str:
    longest = "no limit" if partition.max_time_s is None else f"{partition.max_time_s / 3600:,.4g} h at most"
    gpus = f"{partition.gpus_per_node} GPUs, " if partition.gpus_per_node else ""
    mark, state = "*" * partition.is_default, "" if partition.state == "up" else f", {partition.state}"
    size = f"{partition.nodes} nodes of {gpus}{partition.cpus_per_node} CPUs"
    return f"{partition.name}{mark}: {size}, {longest}{state}"
