"""Check the cluster as Slurm describes it: controller, partitions, preemption, shared directories, the site file."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fnet_dist.config.schema import Config
from fnet_dist.processes import CODE_ROOT
from jobs.doctor.machine import node_names
from jobs.doctor.result import MISS, OK, WARN, Check
from jobs.submission.preflight import not_shared
from slurm import client
from slurm.errors import SlurmError
from slurm.sandbox.cluster import is_private
from slurm.sbatch_options import Options
from slurm.site_config import Site, first_site, site_path
from slurm.types import Configuration, Partition

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel", "sacct")
OLDEST = (22, 5)
MAX_SHOWN = 6  # partitions on one line
MAX_NODES = 16  # resolved on this machine: each name that fails takes seconds
MIN_KILL_WAIT_S = 5  # two seconds to agree on a step, and a save on a slow disk
# slurm.conf(5), PreemptMode: what happens, and the fix where a run does not continue by itself.
PREEMPT_MODES = {
    "OFF": ("Slurm preempts no job", ""),
    "REQUEUE": ("a preempted run starts again by itself", ""),
    "CANCEL": ("a preempted run ends", "the same `submit` continues it"),
    "SUSPEND": ("a preempted run is suspended and keeps GPU memory", "a partition that requeues or is not preempted"),
}


def check_slurm(config: Config, options: Options, own: Site, *, resolve_nodes: bool) -> list[Check]:
    """Return the checks of the cluster, as seen from this machine: one, OK, if it has no Slurm at all."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if len(missing) == len(PROGRAMS):
        return [Check("Slurm", OK, "not on this machine; `fnet run` works without, `fnet submit` does not")]
    if missing:
        fix = "Slurm's client programs (slurm-client)"
        return [Check("Slurm", MISS, f"not on the PATH: {', '.join(missing)}", fix)]
    try:
        configuration, available = client.configuration(), client.partitions()
        names = client.node_names()[:MAX_NODES] if resolve_nodes else ()
    except SlurmError as error:
        if client.NO_CLUSTER in str(error):
            found = "its programs are here, but no cluster is configured; `fnet run` works without"
            return [Check("Slurm", WARN, found, "to submit, SLURM_CONF; to try, `fnet cluster up`")]
        return [Check("Slurm", MISS, str(error), "scontrol ping; SLURM_CONF; munge; or ask the site")]
    return [
        controller(configuration),
        site(available),  # writes a first slurm/site.toml if there is none
        partitions(available, options.partition),
        preemption(configuration),
        shared(Path(config.run.root).expanduser(), own.run_root),
        *([node_names(names, WARN)] if resolve_nodes else []),
    ]


def slurm_on_node() -> Check:
    """Check that a node reaches slurmctld: node 0 of a job asks it for the requeue, by scontrol alone."""
    try:
        return controller(client.configuration())
    except SlurmError as error:
        fix = "Slurm's client programs on the nodes; scontrol ping there; SLURM_CONF; munge; or ask the site"
        return Check("Slurm", MISS, f"no job can requeue itself: {error}; it ends at its time limit", fix)


def controller(configuration: Configuration) -> Check:
    """Check Slurm's version, and return how long the end of a job is remembered."""
    number = tuple(map(int, re.findall(r"\d+", configuration.version)[:2]))
    if number < OLDEST:
        return Check("Slurm", MISS, f"{configuration.version}, older than {OLDEST[0]}.{OLDEST[1]:02}", "a newer Slurm")
    remembered = f"accounting off: how a job ended is known for {configuration.min_job_age_s} s"
    return Check("Slurm", OK, f"{configuration.version}, {'accounting on' if configuration.accounting else remembered}")


def partitions(available: Sequence[Partition], wanted: str | None) -> Check:
    """Check that one of the `wanted` partitions (separated by commas; None: the default) exists and accepts jobs."""
    names = wanted.split(",") if wanted else [partition.name for partition in available if partition.is_default]
    more = f"; {len(available) - MAX_SHOWN} more" if len(available) > MAX_SHOWN else ""
    listed = "; ".join(map(_describe, available[:MAX_SHOWN])) + more
    fix = "`partition` in slurm/site.toml, or -p"
    if not names:
        return Check("partitions", WARN, f"none is the default: {listed}", fix)
    if unknown := [name for name in names if name not in {partition.name for partition in available}]:
        return Check("partitions", MISS, f"{unknown[0]!r} is none of {listed}", fix)
    if all(partition.state != "up" for partition in available if partition.name in names):
        return Check("partitions", MISS, f"{', '.join(names)} takes no jobs now: {listed}", f"{fix}; or ask the site")
    return Check("partitions", OK, listed)


def preemption(configuration: Configuration) -> Check:
    """Check what happens to a preempted run, and if KillWait (from TERM to KILL) leaves time for a checkpoint."""
    mode = next((mode for mode in configuration.preempt_modes if mode in PREEMPT_MODES), "OFF")
    effect, fix = PREEMPT_MODES[mode]
    if configuration.kill_wait_s < MIN_KILL_WAIT_S:
        fix = "save often: --checkpoint.every-steps"
    found = f"PreemptMode {mode}: {effect}; KillWait: {configuration.kill_wait_s} s for a save after TERM"
    return Check("preemption", WARN if fix else OK, found, fix)


def shared(root: Path, shared_root: str | None) -> Check:
    """Check that nodes can see the runs: they are not on a file system of this machine alone."""
    try:
        if (wrong := not_shared(root, shared_root)) is not None:
            return Check("shared", MISS, *wrong.split("; ", 1))
    except SlurmError as error:
        return Check("shared", WARN, f"not known: {error}", "run doctor again")
    return Check("shared", OK, f"nodes can probably see {root}; doctor --cluster tests it")


def site(available: Sequence[Partition], path: Path | None = None) -> Check:
    """Check that slurm/site.toml exists; otherwise write a first one from the partitions. Never overwrite one."""
    path, example = path or site_path(), CODE_ROOT / "slurm" / "site.example.toml"
    if not path.exists() and is_private():  # its partitions would refuse the next job on the real cluster
        return Check("site", OK, f"{path.name} is not written for a private Slurm")
    try:
        with path.open("x", encoding="utf-8") as file:  # "x": never overwrite a file of the user
            file.write(first_site(available, example.read_text(encoding="utf-8")))
    except FileExistsError:
        return Check("site", OK, f"{path.name} exists, and is left as it is")
    except OSError as error:
        return Check("site", WARN, f"{path} cannot be written: {error.strerror}", f"write it, as in {example.name}")
    return Check("site", OK, f"{path} was written, from what sinfo says: look at it")


def _describe(partition: Partition) -> str:
    longest = "no limit" if partition.max_time_s is None else f"{partition.max_time_s / 3600:,.4g} h at most"
    gpus = f"{partition.gpus_per_node} GPUs, " if partition.gpus_per_node else ""
    mark, state = "*" * partition.is_default, "" if partition.state == "up" else f", {partition.state}"
    size = f"{partition.nodes} nodes of {gpus}{partition.cpus_per_node} CPUs"
    return f"{partition.name}{mark}: {size}, {longest}{state}"
