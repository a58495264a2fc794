"""The daemons of a private Slurm, one by one: started, and killed as faults do it."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from slurm.errors import SlurmError
from slurm.sandbox.conf_files import CONTROLLER, LOOPBACK, LocalCluster, slurmdbd_conf, user
from slurm.sandbox.processes import PATH, kill, launch, log_of, own_host, path_of, processes, title

START_S = 30.0  # 1 s is usual, 4 s with accounting, 10 s with its database on a disk
ASK_S = 2.0  # sinfo would wait long for a slurmctld that is not there
# Only after a kill -9 of slurmd alone does the node stay; a line in its pipe starts slurmd again.
_NODE = 'while "$0" -D -N "$1"; [ $? = 137 ]; do read -r _ < "$2"; done'
# Writing its tables out takes a database 8 s on a disk; a file system in memory, where one may be mounted,
# takes 1 s and goes away with it.
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
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = [f"--key-file={key}", f"--seed-file={run}/munge.seed", f"--pid-file={run}/munge.pid"]
    files += [f"--socket={run}/munge.sock", f"--log-file={cluster.directory}/log/munged.log"]
    # --force: it would rather have a socket that everybody may reach.
    _launch(cluster, "munged", [path_of("munged"), "--foreground", "--force", *files])
    until(cluster, ["munged"], lambda: _answers(run / "munge.sock"))


def start_accounting(cluster: LocalCluster) -> None:
    """Start a database that only this directory reaches, then slurmdbd on it; wait until both answer."""
    database, sock = cluster.directory / "db", cluster.directory / "run" / "db.sock"
    where = "memory" if cluster.own_hosts else "disk"
    words = ["sh", "-c", _DATABASE, where, path_of("mariadb-install-db"), path_of("mariadbd"), str(database)]
    _launch(cluster, "mariadbd", [*words, user(), str(sock)], CONTROLLER)
    until(cluster, ["mariadbd"], lambda: _answers(sock))
    conf = cluster.directory / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(slurmdbd_conf(cluster), encoding="utf-8")
    _launch(cluster, "slurmdbd", [path_of("slurmdbd"), "-D"], CONTROLLER, MYSQL_UNIX_PORT=str(sock))
    until(cluster, ["slurmdbd"], lambda: _answers((LOOPBACK, cluster.port + 1)))


def start_controller(cluster: LocalCluster) -> None:
    """Start slurmctld, which takes up the jobs of the one before it, and wait until it answers."""
    _launch(cluster, "slurmctld", [path_of("slurmctld"), "-D"], CONTROLLER)
    until(cluster, ["slurmctld"], lambda: _answers((LOOPBACK, cluster.port)))


def start_node(cluster: LocalCluster, node: str) -> None:
    """Power a node on, with its slurmd; returns at once."""
    words = ["sh", "-c", _NODE, path_of("slurmd"), node, str(_wake(cluster, node))]
    _launch(cluster, node, words, node, SLURM_CONF=str(cluster.directory / "slurmd.conf"))


def start_slurmd(cluster: LocalCluster, node: str) -> None:
    """Start the slurmd of a node where kill_slurmd ended it; returns at once."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            pipe = os.open(_wake(cluster, node), os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:  # nobody reads
            if time.monotonic() > deadline:
                raise SlurmError(f"{node} does not wait for its slurmd to be started: is it killed?") from error
            time.sleep(0.01)
        else:
            break
    os.write(pipe, b"\n")
    os.close(pipe)


def kill_controller(cluster: LocalCluster) -> None:
    """Kill slurmctld, as kill -9 does."""
    kill(cluster.directory, "slurmctld")


def kill_node(cluster: LocalCluster, node: str) -> None:
    """Kill all that runs on a node at once, as a power cut does."""
    kill(cluster.directory, node)


def kill_slurmd(cluster: LocalCluster, node: str) -> None:
    """Kill the slurmd of a node alone, as kill -9 does: its jobs go on."""
    for pid in processes(cluster.directory, node):
        if title(pid)[:1] == [path_of("slurmd")]:
            os.kill(pid, signal.SIGKILL)


def stepds(cluster: LocalCluster, node: str, job: int) -> dict[str, int]:
    """The slurmstepd of each step of a job on a node, "batch" and "0" for example: its process id."""
    found = {}
    for pid in processes(cluster.directory, node):
        words = title(pid)  # slurmstepd: [12.batch]
        if words[:1] == ["slurmstepd:"] and words[1].startswith(f"[{job}."):
            found[words[1].strip("[]").partition(".")[2]] = pid
    return found


def until(cluster: LocalCluster, names: Sequence[str], condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds while the daemons `names` start.

    Raises SlurmError with the end of a log if one of them ends, or after START_S.
    """
    deadline = time.monotonic() + START_S
    while not condition():
        ended = [name for name in names if not processes(cluster.directory, name)]
        if ended or time.monotonic() > deadline:
            name = ended[0] if ended else names[0]
            said = log_of(cluster.directory, name).read_text(encoding="utf-8", errors="replace").split("\n")[-6:]
            how = "ended" if ended else f"did not get ready within {START_S:.0f} s"
            raise SlurmError(f"{name} {how}; it said last: {' | '.join(filter(None, said)) or 'nothing'}")
        time.sleep(0.02)


def dead_daemons(cluster: LocalCluster) -> list[str]:
    """The daemons and nodes of which no process is left."""
    names = ["munged", *(("mariadbd", "slurmdbd") if cluster.accounting else ()), "slurmctld", *cluster.nodes]
    return [name for name in names if not processes(cluster.directory, name)]


def node_states(cluster: LocalCluster) -> list[str]:
    """The state of each node in sinfo's words; none while slurmctld does not answer."""
    words = [path_of("sinfo"), "--noheader", "--Node", "--partition=main", "--format=%T"]
    environment = {"PATH": PATH, **cluster.environment}
    try:
        asked = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        return []
    return asked.stdout.split()


def _launch(cluster: LocalCluster, name: str, words: list[str], host: str = "", **variables: str) -> None:
    cwd = cluster.directory / name
    cwd.mkdir(exist_ok=True)
    moved = own_host(host, cluster.directory / "hosts") if host and cluster.own_hosts else []
    launch(cluster.directory, name, [*moved, *words], {**cluster.environment, **variables}, cwd)


def _wake(cluster: LocalCluster, node: str) -> Path:
    return cluster.directory / "run" / f"{node}.wake"


def _answers(address: Path | tuple[str, int]) -> bool:
    """Whether something listens at a socket's path or at a host and port."""
    family, where = (socket.AF_UNIX, str(address)) if isinstance(address, Path) else (socket.AF_INET, address)
    with closing(socket.socket(family)) as client:
        client.settimeout(ASK_S)
        return client.connect_ex(where) == 0
