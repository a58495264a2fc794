"""Start the daemons of a private Slurm one by one, and ask if they run."""

import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from slurm.errors import SlurmError
from slurm.sandbox.conf_files import CONTROLLER, LOOPBACK, LocalCluster, user
from slurm.sandbox.processes import MARK, PATH, own_host, path_of, processes, run_silently

START_S = 30.0  # usually 1 s; 4 s with accounting, 10 s with its database on a disk
ASK_S = 2.0  # without slurmctld, sinfo would retry for longer
# The first process of a node. If slurmd alone is killed with SIGKILL (137), the node and its jobs stay up, and a line
# in the node's pipe starts slurmd again.
_NODE = 'while "$0" -D -N "$1"; [ $? = 137 ]; do read -r _ < "$2"; done'
# Creating its tables takes the database 8 s on a disk, and 1 s in a tmpfs, which goes away with the mount namespace.
_DATABASE = """
[ "$0" = disk ] || mount -t tmpfs -o mode=700 tmpfs "$3"
"$1" --no-defaults --user="$4" --datadir="$3" --auth-root-authentication-method=normal --skip-test-db \
    --skip-name-resolve &&
exec "$2" --no-defaults --user="$4" --datadir="$3" --socket="$5" --pid-file="$3/pid" --skip-networking \
    --skip-grant-tables
"""


def start_munge(cluster: LocalCluster) -> None:
    """Start munged with a key of its own, and wait until it answers."""
    run = cluster.directory / "run"
    key = run / "munge.key"
    key.touch(mode=0o600)  # munged refuses a key that others can read
    key.write_bytes(secrets.token_bytes(128))
    files = [f"--key-file={key}", f"--seed-file={run}/munge.seed", f"--pid-file={run}/munge.pid"]
    files += [f"--socket={run}/munge.sock", f"--log-file={cluster.directory}/log/munged.log"]
    # --force: munged otherwise refuses a socket that other users cannot reach.
    _launch(cluster, "munged", [path_of("munged"), "--foreground", "--force", *files])
    until(cluster, ["munged"], lambda: _answers(run / "munge.sock"))


def start_accounting(cluster: LocalCluster) -> None:
    """Start a database that only this directory reaches, then slurmdbd on it; wait until both answer."""
    database, sock = cluster.directory / "db", cluster.directory / "run" / "db.sock"
    storage = "memory" if cluster.own_hosts else "disk"
    command = ["sh", "-c", _DATABASE, storage, path_of("mariadb-install-db"), path_of("mariadbd"), str(database)]
    _launch(cluster, "mariadbd", [*command, user(), str(sock)], CONTROLLER)
    until(cluster, ["mariadbd"], lambda: _answers(sock))
    _launch(cluster, "slurmdbd", [path_of("slurmdbd"), "-D"], CONTROLLER, MYSQL_UNIX_PORT=str(sock))
    until(cluster, ["slurmdbd"], lambda: _answers((LOOPBACK, cluster.port + 1)))


def start_controller(cluster: LocalCluster) -> None:
    """Start slurmctld, which restores the jobs of the one before it, and wait until it answers."""
    _launch(cluster, "slurmctld", [path_of("slurmctld"), "-D"], CONTROLLER)
    until(cluster, ["slurmctld"], lambda: _answers((LOOPBACK, cluster.port)))


def start_node(cluster: LocalCluster, node: str) -> None:
    """Start a node with its slurmd. Return at once."""
    command = ["sh", "-c", _NODE, path_of("slurmd"), node, str(cluster.directory / "run" / f"{node}.wake")]
    _launch(cluster, node, command, node, SLURM_CONF=str(cluster.directory / "slurmd.conf"))


def until(cluster: LocalCluster, names: Sequence[str], condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds while the daemons `names` start.

    Raises SlurmError with the last lines of its log if one of them ends, or after START_S.
    """
    deadline = time.monotonic() + START_S
    while not condition():
        ended = [name for name in names if not processes(cluster.directory, name)]
        if ended or time.monotonic() > deadline:
            name = ended[0] if ended else names[0]
            log = (cluster.directory / "log" / name).read_text(encoding="utf-8", errors="replace").split("\n")[-6:]
            problem = "ended" if ended else f"did not get ready within {START_S:.0f} s"
            raise SlurmError(f"{name} {problem}; the end of its log: {' | '.join(filter(None, log)) or 'nothing'}")
        time.sleep(0.02)


def dead_daemons(cluster: LocalCluster) -> list[str]:
    """Return the names of the daemons and nodes that have no process left."""
    names = ["munged", *(("mariadbd", "slurmdbd") if cluster.accounting else ()), "slurmctld", *cluster.nodes]
    return [name for name in names if not processes(cluster.directory, name)]


def node_states(cluster: LocalCluster) -> list[str]:
    """Return the state of each node as sinfo prints it; [] while slurmctld does not answer."""
    ended = run_client(cluster, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
    return [] if ended is None else ended.stdout.split()


def run_client(cluster: LocalCluster, name: str, *options: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's client programs to its end. Return None if it takes longer than ASK_S."""
    command, environment = [path_of(name), *options], {"PATH": PATH, **cluster.environment}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        return None


def _launch(cluster: LocalCluster, name: str, command: list[str], host: str = "", **variables: str) -> None:
    """Start a daemon in a session of its own, on `host` if given; append its output to its log."""
    cwd = cluster.directory / name
    cwd.mkdir(exist_ok=True)
    prefix = own_host(host, cluster.directory / "hosts") if host and cluster.own_hosts else []
    marked = {"PATH": PATH, **cluster.environment, **variables, MARK: str(cwd)}
    script = 'exec >>"$0" 2>&1 </dev/null; setsid "$@" &'
    run_silently(["sh", "-c", script, f"{cluster.directory}/log/{name}", *prefix, *command], marked, cwd)


def _answers(address: Path | tuple[str, int]) -> bool:
    """Return if something listens on a Unix socket's path, or on a host and port."""
    family, target = (socket.AF_UNIX, str(address)) if isinstance(address, Path) else (socket.AF_INET, address)
    with closing(socket.socket(family)) as client:
        client.settimeout(ASK_S)
        return client.connect_ex(target) == 0  # a socket file can outlive its process
