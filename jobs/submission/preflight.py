"""Checks before a job is submitted: each problem is one line that says what to change."""

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fnet_dist.config.schema import Config
from fnet_dist.config.slurm_resources import limit_s
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute
from fnet_dist.recipe import recipe_of
from fnet_dist.run.attempt import is_alive, last_attempt, owner_message
from fnet_dist.run.console import command_for, fnet_command
from fnet_dist.run.run_dir import RunDir
from jobs.monitor.slurm_queue import run_job_of
from jobs.runs import queued_jobs, runs_of_job
from slurm import client
from slurm.errors import SlurmError
from slurm.sbatch_options import Options
from slurm.submit_env import submission_environment
from slurm.types import Partition, QueuedJob, ShownJob

# File systems (proc(5), mounts) that only one machine sees.
LOCAL_FS = {"tmpfs", "ramfs", "devtmpfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "vfat"}


def check_job(
    config: Config,
    runs: Sequence[RunDir],
    options: Options,
    shared_root: str | None,
    script: str,
    *,
    on_slurm: bool = True,
    dry_run: bool = False,
) -> None:
    """Raise ConfigError, naming the first problem, if the job could not train its `runs`.

    Check that no other job has the runs, data, directories and the key for W&B; and `on_slurm` the cluster, GPUs, and
    that nodes see the directories. `shared_root` is one that all nodes see, as site.toml says. `script` is what sbatch
    gets. A `dry_run` needs no cluster: a note on standard error says that it was not checked.
    """
    try:
        problems = [*map(_owner, runs), missing_data(config), not_writable(runs[0].path), _no_key(config)]
        if on_slurm:
            problems += [cluster_refuses(config, options, script), _idle_gpus(config)]
            problems.append(not_shared(runs[0].path, shared_root))
    except SlurmError as error:
        if not dry_run:
            raise
        print(f"not checked against a cluster: {error}", file=sys.stderr)
        return
    for problem in filter(None, problems):
        raise ConfigError(problem)


def print_expected_start(script: str, options: Options) -> None:
    """Print what `sbatch --test-only` says of the start, as a comment below the script; nothing without a cluster."""
    with submission_environment(options), suppress(SlurmError):
        print(f"# Slurm, now: {client.would_accept(script)[1]}")


def jobs_that_train(run: RunDir) -> list[QueuedJob | ShownJob]:
    """Return the queued and running Slurm jobs of `run`, but one that goes on without it, as other runs share it."""
    newest = run_job_of(run)
    return [
        job
        for job in queued_jobs(run)
        if newest is None
        or newest.job_id != job.job_id
        or not newest.is_over
        or len(runs_of_job(job.job_id, run.path.parent)) == 1
    ]


def _owner(run: RunDir) -> str | None:
    for job in jobs_that_train(run):
        command = f"{fnet_command()} cancel {job.job_id}"
        if len(runs_of_job(job.job_id, run.path.parent)) > 1:  # which would end the others too
            command = command_for(run, "stop")
        return (
            f"{run.path} is owned by Slurm job {job.job_id} ({job.state.lower()}); wait for it, end it with "
            f"`{command}`, or use another --run.name"
        )
    last = last_attempt(run)
    # A Slurm job that has left the queue is over, however young its last heartbeat.
    if last is not None and last.read_begin()["slurm_job_id"] is None and is_alive(last):
        return owner_message(last)
    return None


def _idle_gpus(config: Config) -> str | None:
    gpus = config.resources.gpus_per_node if config.parallel.device == "cpu" else 0
    idle = f"{gpus} GPU{'s' * (gpus > 1)} a node would stand idle"
    return f"parallel.device is cpu, so {idle}; use --parallel.device auto, or no GPUs" if gpus else None


def not_writable(path: Path) -> str | None:
    """Return the problem if nothing can be written at `path`, which need not exist yet; else None."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        # fsync: a full quota is often reported only when the data reaches the server.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1 << 20))  # more than an inode holds inline, so that blocks are needed
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fix = "use another --run.root, or run_root in slurm/site.toml"
        return f"{path} cannot be written: {existing}: {error.strerror}; {fix}"
    return None


def cluster_refuses(config: Config, options: Options, script: str) -> str | None:
    """Return what the job asks for and no named partition has, if sbatch refuses `script` for it; else None.

    Where sbatch would take it, print the doubt: a plugin may choose a partition, or a QOS override its limits.
    """
    doubt = cluster_lacks(config, options, client.partitions())
    if doubt is None:
        return None
    with submission_environment(options):
        if not client.would_accept(script)[0]:
            return doubt
    print(f"WARNING: {doubt}; Slurm takes the job all the same, and may let it wait", file=sys.stderr)
    return None


def cluster_lacks(config: Config, options: Options, partitions: Sequence[Partition]) -> str | None:
    """Return what the job asks for and no named partition has; None if one of them fits."""
    sizes = config.resources
    names = {partition.name for partition in partitions}
    requested = options.partition.split(",") if options.partition else [p.name for p in partitions if p.is_default]
    if unknown := [name for name in requested if name not in names]:
        return f"partition {unknown[0]!r} is not in this cluster; it has {', '.join(sorted(names))}"
    if not requested:
        return f"the cluster has no default partition; use --partition, one of {', '.join(sorted(names))}"
    cpus = sizes.cpus_per_rank * sizes.ranks_per_node
    reasons = []
    for partition in (p for p in partitions if p.name in requested):
        nodes = min(partition.nodes, partition.max_nodes_per_job or partition.nodes)
        limits = [
            ("resources.nodes", sizes.nodes, nodes, "nodes"),
            ("resources.gpus_per_node", sizes.gpus_per_node, partition.gpus_per_node, "GPUs a node"),
            ("resources.cpus_per_rank x ranks a node", cpus, partition.cpus_per_node, "CPUs a node"),
            ("resources.mem_gb", sizes.mem_gb or 0, partition.memory_mb_per_node / 1024, "GB a node"),
            ("resources.time", limit_s(sizes.time) / 60, (partition.max_time_s or 1e12) / 60, "minutes"),
        ]
        wrong = next((limit for limit in limits if limit[1] > limit[2]), None)
        if wrong is None:
            return None
        reasons.append(f"{wrong[0]} is {wrong[1]:,g}, partition {partition.name} has {wrong[2]:,g} {wrong[3]}")
    return f"{'; '.join(reasons)}; ask for less, or another --partition"


def not_shared(path: Path, shared_root: str | None) -> str | None:
    """Return the problem if `path` is on a file system of this machine alone, and a node is elsewhere; else None."""
    # A network file system passes: the path at which nodes see it is not known from here.
    kind = _file_system(absolute(path))
    if kind not in LOCAL_FS or (shared_root and path.is_relative_to(absolute(Path(shared_root).expanduser()))):
        return None
    for name in client.node_names():
        if not _is_here(client.node_address(name) or name):
            return (
                f"{path} is on {kind}, which only {socket.gethostname()} sees, and node {name} is elsewhere; put runs "
                "on a file system of all nodes: --run.root, or run_root in slurm/site.toml (which is not checked)"
            )
    return None


def _file_system(path: Path) -> str:
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    rows = [line.split() for line in mounts.splitlines()]  # device, path, type, ...
    holding = [row for row in rows if path.is_relative_to(row[1].replace("\\040", " "))]
    return max(holding, key=lambda row: len(row[1]))[2] if holding else "?"  # the innermost mount counts


def _is_here(host: str) -> bool:
    """Return True if `host` is an address of this machine: only those can be bound."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _no_key(config: Config) -> str | None:
    if config.tracking.wandb != "online":
        return None
    from fnet_dist.tracking.mode import missing_key  # imports the SDK, which takes a second

    if (missing := missing_key()) is None:
        return None
    return f"tracking.wandb online: {missing}; `wandb login`, export WANDB_API_KEY, or --tracking.wandb auto"


def missing_data(config: Config) -> str | None:
    """Return the problem if the recipe says that its data is missing or damaged, else None."""
    recipe = recipe_of(config.recipe)
    return recipe.missing_data(config.data) if hasattr(recipe, "missing_data") else None
