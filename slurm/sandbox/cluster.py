"""A real Slurm on this machine, in one private directory: slurmctld, a slurmd for each virtual node, munge, accounting.

Of /etc only the hosts file is read, nothing is written outside of the directory, no root is needed and no cgroup. Where
namespaces are allowed, a node has a host name and process ids of its own, so that it can be killed as by a power cut.
All listen on loopback, so nodes share the machine's ports. GPUs are pretended. A cluster always starts empty.
"""

import json
import os
import random
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from slurm.errors import OptionError, SlurmError
from slurm.sandbox.conf_files import LocalCluster, gres_conf, hosts, slurm_conf, slurmd_conf
from slurm.sandbox.daemons import node_states, start_accounting, start_controller, start_munge, start_node, until
from slurm.sandbox.processes import kill, may_have_own_host, program

PROGRAMS = {
    "slurmctld": ("slurmctld",),
    "slurmd": ("slurmd",),
    "slurm-client": ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"),
    "munge": ("munged",),
}
ACCOUNTING_PROGRAMS = {"slurmdbd": ("slurmdbd",), "mariadb-server": ("mariadbd", "mariadb-install-db")}
MOST_NODES = 32
LONGEST = 60  # characters of the directory: sockets lie in it, and a socket's path ends at 108 (man 7 unix)
PORTS = range(10_000, 30_000)  # below those that Linux gives to whoever asks for any
_STATE = "cluster.json"


def check_size(nodes: int) -> None:
    """Raise OptionError if a cluster of so many nodes is none, or more than a machine is to bear."""
    if not 1 <= nodes <= MOST_NODES:
        raise OptionError(f"{nodes} nodes: expected 1 to {MOST_NODES}, as all of them run on this machine")


def missing_programs(accounting: bool = False) -> str | None:
    """In one line, what is missing and how to get it; None if all is there."""
    needed = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    lacking = {package: [name for name in names if program(name) is None] for package, names in needed.items()}
    missing = [name for names in lacking.values() for name in names]
    if not missing:
        return None
    packages = " ".join(package for package, names in lacking.items() if names)
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} missing; on Debian: apt-get install --no-install-recommends {packages}"


@contextmanager
def local_cluster(
    nodes: int = 3,
    *,
    directory: Path | None = None,
    accounting: bool = False,
    gpus_per_node: int = 2,
    cpus_per_node: int = 4,
    proctrack: str = "linuxproc",
) -> Iterator[LocalCluster]:
    """start_cluster, and stop_cluster at the end."""
    cluster = start_cluster(
        nodes,
        directory=directory,
        accounting=accounting,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        proctrack=proctrack,
    )
    try:
        yield cluster
    finally:
        stop_cluster(cluster.directory)


def start_cluster(
    nodes: int = 3,
    *,
    directory: Path | None = None,
    accounting: bool = False,
    gpus_per_node: int = 2,
    cpus_per_node: int = 4,
    proctrack: str = "linuxproc",
) -> LocalCluster:
    """Start the nodes node0, node1 and so on, and wait until all are idle. `directory` must not exist yet.

    Partitions: main, the default; high, for which the jobs of low are requeued at once and those of grace after 15 s.
    Raises SlurmError, with nothing left behind, if programs are missing or a daemon does not come up.
    """
    check_size(nodes)
    missing = missing_programs(accounting)
    if missing:
        raise SlurmError(missing)
    made = _make_directory(directory)
    try:
        names = tuple(f"node{index}" for index in range(nodes))
        port = _free_ports(nodes + 2)
        cluster = LocalCluster(made, names, port, False, accounting, gpus_per_node, cpus_per_node, proctrack)
        cluster = _write_files(cluster)
        start_munge(cluster)
        if accounting:
            start_accounting(cluster)
        start_controller(cluster)
        for name in names:
            start_node(cluster, name)
        until(cluster, ["slurmctld", *names], lambda: node_states(cluster) == ["idle"] * nodes)
    except BaseException:
        stop_cluster(made)
        raise
    return cluster


def stop_cluster(directory: Path) -> None:
    """End every process of the cluster in `directory`, its jobs included, and remove the directory.

    Also of what is left of one. Raises SlurmError if the directory is not this user's own.
    """
    if there := directory.is_symlink() or directory.exists():
        _check_own(directory)
    kill(directory)
    if there:
        shutil.rmtree(directory)


def read_cluster(directory: Path) -> LocalCluster | None:
    """The cluster that was started in `directory`; None if there is no such directory.

    Raises SlurmError if the directory is not this user's own, or a start has not got far in it.
    """
    if not directory.is_symlink() and not directory.exists():
        return None
    _check_own(directory)
    try:
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlurmError(
            f"{directory} holds no cluster: its start is under way or was cut off; stop it first"
        ) from None
    return LocalCluster(**{**state, "directory": Path(state["directory"]), "nodes": tuple(state["nodes"])})


def _check_own(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SlurmError(f"{directory} is not a directory of this user alone, mode 700; look at it and remove it")


def _make_directory(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")).resolve()
    directory = directory.parent.resolve() / directory.name
    if len(str(directory)) > LONGEST:
        raise SlurmError(f"{directory} is too long for the sockets in it; expected at most {LONGEST} characters")
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise SlurmError(f"{directory} exists already; expected a directory that is yet to be made") from None
    return directory


def _free_ports(count: int) -> int:
    """The first of `count` ports that nobody listens at."""
    while True:
        first = random.choice(PORTS)
        try:
            for port in range(first, first + count):
                with socket.socket() as tried:
                    tried.bind(("", port))
        except OSError:
            continue
        return first


def _write_files(cluster: LocalCluster) -> LocalCluster:
    """Write all that the daemons read; returns the cluster with `own_hosts` as this machine allows it."""
    for name in ("state", "log", "run", "dev", "db"):
        (cluster.directory / name).mkdir()
    for index in range(cluster.gpus_per_node):
        (cluster.directory / "dev" / f"nvidia{index}").symlink_to("/dev/null")
    for name in cluster.nodes:
        os.mkfifo(cluster.directory / "run" / f"{name}.wake")
    (cluster.directory / "hosts").write_text(hosts(cluster))
    cluster = replace(cluster, own_hosts=may_have_own_host(cluster.directory / "hosts"))
    (cluster.directory / "slurm.conf").write_text(slurm_conf(cluster))
    (cluster.directory / "slurmd.conf").write_text(slurmd_conf(cluster))
    (cluster.directory / "gres.conf").write_text(gres_conf(cluster))
    (cluster.directory / _STATE).write_text(json.dumps({**asdict(cluster), "directory": str(cluster.directory)}))
    return cluster
