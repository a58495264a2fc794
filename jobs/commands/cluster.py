"""fnet cluster up|status|down: a private Slurm on this machine, to try commands on (trust)"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fnet_dist.errors import FnetError
from jobs.verification.supervised_run import interrupted_by_term
from slurm.sandbox.cluster import read_cluster, start_cluster, stop_cluster
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.daemons import ASK_S, dead_daemons
from slurm.sandbox.processes import PATH, path_of

QUESTIONS = (
    ("sinfo", "--Node", "--partition=main", "--format=%10N %12T %5c %G"),
    ("squeue", "--format=%10i %10P %20j %12T %8M %6D %R"),
)


def main(argv: Sequence[str]) -> int:
    """Start, show or end this user's cluster. Raises FnetError with what Slurm's programs said."""
    parser = argparse.ArgumentParser(
        prog="fnet cluster",
        description="A private Slurm on this machine, to try things on: virtual nodes, pretended GPUs, no root needed.",
    )
    parser.add_argument("do", metavar="up|status|down", choices=("up", "status", "down"))
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (%(default)s)")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd, so that sacct answers")
    asked = parser.parse_args(argv)
    directory = Path(tempfile.gettempdir(), f"fnet-slurm-{os.geteuid()}")
    if asked.do == "down":
        down(directory)
    elif asked.do == "up":
        with interrupted_by_term():
            up(directory, asked.nodes, asked.accounting)
    else:
        show(read_cluster(directory))
    return 0


def up(directory: Path, nodes: int, accounting: bool) -> None:
    """Start the cluster, or say that it is up, and how to use it."""
    cluster = read_cluster(directory)
    if cluster is None:
        cluster = start_cluster(nodes, directory=directory, accounting=accounting)
        print(f"up: {', '.join(cluster.nodes)}" + (", with accounting" if accounting else ""))
    elif dead := dead_daemons(cluster):
        raise FnetError(f"{directory}: {', '.join(dead)} died; python -m jobs cluster down, then up")
    else:
        print(f"up already: {', '.join(cluster.nodes)}" + (", with accounting" if cluster.accounting else ""))
    if not cluster.own_hosts:
        print("namespaces are not allowed here: all nodes have this machine's host name")
    print(f"\n  export SLURM_CONF={cluster.environment['SLURM_CONF']}\n  sinfo\n  srun --nodes=2 hostname\n")
    print("partitions: main; high, for which jobs of low are requeued at once and of grace after 15 s")
    print("to try: python -m jobs submit jobs/quickstart.toml -N 2 -t 10; to end: python -m jobs cluster down")


def down(directory: Path) -> None:
    """End the cluster and all that runs on it, whatever state it is in."""
    there = directory.exists()
    stop_cluster(directory)
    print("down: no process and no file of it is left; unset SLURM_CONF" if there else "no cluster is up")


def show(cluster: LocalCluster | None) -> None:
    """Nodes and jobs, in Slurm's words."""
    if cluster is None:
        raise FnetError("no cluster is up; start one: python -m jobs cluster up")
    if dead := dead_daemons(cluster):
        print(f"died: {', '.join(dead)}")
    for program, *options in QUESTIONS:
        environment = {"PATH": PATH, **cluster.environment}
        words = [path_of(program), *options]
        try:
            said = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=ASK_S)
        except subprocess.TimeoutExpired:
            raise FnetError(f"slurmctld did not answer {program} within {ASK_S:.0f} s") from None
        if said.returncode:
            raise FnetError(" ".join(said.stderr.split()))
        print(said.stdout, end="")
