"""Start and stop a real Slurm in a private directory: slurmctld, a slurmd for each virtual node, munge, accounting.

It needs neither root nor cgroups, reads only the hosts file of /etc and writes nothing outside its directory. Where
namespaces are allowed, a node has its own host name and process ids, so killing it is like a power cut. All daemons
listen on loopback, so nodes share the machine's ports. GPUs are simulated. A cluster always starts without jobs.
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
from typing import Any

from slurm.errors import OptionError, SlurmError
from slurm.sandbox.conf_files import CONTROLLER, LOOPBACK, LocalCluster, write_conf_files
from slurm.sandbox.daemons import node_states, start_accounting, start_controller, start_munge, start_node, until
from slurm.sandbox.processes import kill, may_have_own_host, program

PROGRAMS = {
    "slurmctld": ("slurmctld",),
    "slurmd": ("slurmd",),
    "slurm-client": ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"),
    "munge": ("munged",),
}
ACCOUNTING_PROGRAMS = {"slurmdbd": ("slurmdbd",), "mariadb-server": ("mariadbd", "mariadb-install-db")}
MAX_NODES = 32
MAX_PATH = 60  # characters of the directory: sockets are in it, and a socket's path has at most 107 (unix(7))
PORTS = range(10_000, 30_000)  # below the ephemeral ports of Linux (32768 on): no client is given one of them
_STATE = "cluster.json"


def check_size(nodes: int) -> None:
    """Raise OptionError if `nodes` is not a number of nodes that one machine can run."""
    if not 1 <= nodes <= MAX_NODES:
        raise OptionError(f"{nodes} nodes: expected 1 to {MAX_NODES}, as all of them run on this machine")


def missing_programs(accounting: bool = False) -> str | None:
    """Return one line that names the missing programs and how to install them; None if all are there."""
    needed = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    missing = {name: package for package, names in needed.items() for name in names if program(name) is None}
    if not missing:
        return None
    packages = " ".join(dict.fromkeys(missing.values()))
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} missing; on Debian: apt-get install --no-install-recommends {packages}"


@contextmanager
def local_cluster(nodes: int, **options: Any) -> Iterator[LocalCluster]:
    """Start a cluster with the options of start_cluster, and stop it at the end of the block."""
    cluster = start_cluster(nodes, **options)
    try:
        yield cluster
    finally:
        stop_cluster(cluster.directory)


def start_cluster(
    nodes: int,
    *,
    directory: Path | None = None,
    accounting: bool = False,
    gpus_per_node: int = 2,
    cpus_per_node: int = 4,
    proctrack: str = "linuxproc",
) -> LocalCluster:
    """Start the nodes node0, node1 and so on, and wait until all are idle. `directory` must not exist yet.

    Partitions: main, the default; high, for which the jobs of low are requeued at once and those of grace after 15 s.
    `proctrack` is the plugin by which Slurm finds the processes of a job.
    Raises SlurmError, and leaves nothing behind, if programs are missing or a daemon does not start.
    """
    check_size(nodes)
    if missing := missing_programs(accounting):
        raise SlurmError(missing)
    created = _make_directory(directory)
    try:
        names = tuple(f"node{index}" for index in range(nodes))
        port = _free_ports(nodes + 2)  # slurmctld, slurmdbd, and a slurmd for each node
        cluster = LocalCluster(created, names, port, False, accounting, gpus_per_node, cpus_per_node, proctrack)
        cluster = _write_files(cluster)
        start_munge(cluster)
        if accounting:
            start_accounting(cluster)
        start_controller(cluster)
        for name in names:
            start_node(cluster, name)
        until(cluster, ["slurmctld", *names], lambda: node_states(cluster) == ["idle"] * nodes)
    except BaseException:  # Ctrl-C too: daemons have no parent that would end them
        stop_cluster(created)
        raise
    return cluster


def stop_cluster(directory: Path) -> None:
    """Kill every process of the cluster in `directory`, its jobs included, and remove the directory.

    Works on the remains of a cluster too. Raises SlurmError if the directory is not this user's own.
    """
    exists = _check_own(directory)
    kill(directory)  # first: daemons would write into the directory
    if exists:
        shutil.rmtree(directory)


def read_cluster(directory: Path) -> LocalCluster | None:
    """Return the cluster that was started in `directory`; None if there is no such directory.

    Raises SlurmError if the directory is not this user's own, or the start in it has not finished.
    """
    if not _check_own(directory):
        return None
    try:
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlurmError(
            f"{directory} holds no cluster: its start is under way or was cut off; stop it first"
        ) from None
    return LocalCluster(**{**state, "directory": Path(state["directory"]), "nodes": tuple(state["nodes"])})


def is_private() -> bool:
    """Return True if SLURM_CONF names the configuration of a private Slurm."""
    configuration = os.environ.get("SLURM_CONF")
    return configuration is not None and Path(configuration).with_name(_STATE).exists()


def _check_own(directory: Path) -> bool:
    """Return if `directory` exists. Raises SlurmError if it does, and another user made it or can reach it.

    Its name in /tmp is predictable: another user could have made it first, or a symbolic link of that name.
    """
    try:
        found = directory.lstat()  # not stat: a symbolic link must not be followed
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SlurmError(f"{directory} is not a directory of this user alone, mode 700; look at it and remove it")
    return True


def _make_directory(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")).resolve()  # TMPDIR may be too long
    directory = directory.parent.resolve() / directory.name
    if len(str(directory)) > MAX_PATH:
        raise SlurmError(f"{directory} is too long for the sockets in it; expected at most {MAX_PATH} characters")
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise SlurmError(f"{directory} exists already; expected a path that does not exist yet") from None
    return directory


def _free_ports(count: int) -> int:
    """Return the first of `count` consecutive ports on which nothing listens."""
    while True:
        first = random.choice(PORTS)  # random: two clusters may start at once
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first


def _write_files(cluster: LocalCluster) -> LocalCluster:
    """Write the files that the daemons read. Return the cluster with `own_hosts` set as this machine allows it."""
    for name in ("state", "log", "run", "dev", "db"):
        (cluster.directory / name).mkdir()
    for index in range(cluster.gpus_per_node):
        (cluster.directory / "dev" / f"nvidia{index}").symlink_to("/dev/null")  # Slurm takes only device files for GPUs
    for name in cluster.nodes:
        os.mkfifo(cluster.directory / "run" / f"{name}.wake")  # through it a killed slurmd is started again
    hosts = cluster.directory / "hosts"  # the machine's own, and the names of the nodes
    known = Path("/etc/hosts").read_text(encoding="utf-8")
    hosts.write_text(f"{known}\n{LOOPBACK} {CONTROLLER} {' '.join(cluster.nodes)}\n", encoding="utf-8")
    cluster = replace(cluster, own_hosts=may_have_own_host(hosts))
    write_conf_files(cluster)
    (cluster.directory / _STATE).write_text(json.dumps({**asdict(cluster), "directory": str(cluster.directory)}))
    return cluster
