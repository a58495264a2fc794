"""fnet cluster up|status|down: a private Slurm on this machine, to try commands on (trust 5)

It has virtual nodes and simulated GPUs, and needs no root.
"""

import os
import re
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fnet_dist.errors import FnetError
from jobs.runs import command_parser
from slurm.sandbox.cluster import MAX_PATH, read_cluster, start_cluster, stop_cluster
from slurm.sandbox.daemons import ASK_S, dead_daemons, run_client

STATUS_COMMANDS = (
    ("sinfo", "--Node", "--partition=main", "--format=%10N %12T %5c %G"),  # main has each node once
    ("squeue", "--format=%10i %10P %20j %12T %8M %6D %R"),
)


def main(argv: Sequence[str]) -> int:
    """Start, show or stop this user's cluster. Raises FnetError with what Slurm's programs printed."""
    parser = command_parser(__doc__)
    parser.add_argument("do", metavar="up|status|down", choices=("up", "status", "down"))
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (%(default)s)")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd, so that sacct answers")
    args = parser.parse_args(argv)
    directory = _directory()
    if args.do == "down":
        existed = directory.exists()
        stop_cluster(directory)
        print("down: no process and no file of it is left; unset SLURM_CONF" if existed else "no cluster is up")
    elif args.do == "up":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a start that is cut off is taken down
        up(directory, args.nodes, args.accounting)
    else:
        show(directory)
    return 0


def _directory() -> Path:
    """Return this user's directory of the cluster: `down` finds it again."""
    name = f"fnet-slurm-{os.geteuid()}"
    directory = Path(tempfile.gettempdir(), name)
    # TMPDIR may be too long for a socket, or hold characters that slurm.conf cannot spell.
    is_plain = len(str(directory)) <= MAX_PATH and re.fullmatch(r"[\w./+-]+", str(directory), re.ASCII)
    return directory if is_plain else Path("/tmp", name)


def up(directory: Path, nodes: int, accounting: bool) -> None:
    """Start the cluster unless it is up, and print how to use it."""
    cluster, state = read_cluster(directory), "up already"
    if cluster is None:
        cluster, state = start_cluster(nodes, directory=directory, accounting=accounting), "up"
    elif dead := dead_daemons(cluster):  # it would not answer: starting jobs on it would hang
        raise FnetError(f"{directory}: {', '.join(dead)} died; fnet cluster down, then up")
    print(f"{state}: {', '.join(cluster.nodes)}{', with accounting' if cluster.accounting else ''}")
    if not cluster.own_hosts:
        print("namespaces are not allowed here: all nodes have this machine's host name")
    print(f"\n  export SLURM_CONF={cluster.environment['SLURM_CONF']}\n  sinfo\n  srun --nodes=2 hostname\n")
    print("partitions: main; high, for which jobs of low are requeued at once and of grace after 15 s")
    print("next: fnet submit jobs/quickstart.toml --run.name on-slurm -N 2 -t 10; to end: fnet cluster down")


def show(directory: Path) -> None:
    """Print the nodes and jobs, as sinfo and squeue do."""
    if (cluster := read_cluster(directory)) is None:
        raise FnetError("no cluster is up; start one: fnet cluster up")
    if dead := dead_daemons(cluster):
        print(f"died: {', '.join(dead)}")
    for program, *options in STATUS_COMMANDS:
        ended = run_client(cluster, program, *options)
        if ended is None:
            raise FnetError(f"slurmctld did not answer {program} within {ASK_S:.0f} s")
        if ended.returncode:
            raise FnetError(" ".join(ended.stderr.split()))
        print(ended.stdout, end="")
