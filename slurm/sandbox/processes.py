"""Start the processes of a private Slurm without a parent, find them in /proc, and kill them.

Process ids are not written down: one can be given to another process later. Each daemon is found by MARK in its
environment instead, which what it starts inherits.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from slurm.errors import SlurmError

MARK = "LOCAL_SLURM"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian installs daemons; not in an ordinary user's PATH
PATH = f"{SBIN}:/usr/local/bin:/usr/bin:/bin"
KILL_S = 10.0  # processes in a system call of a slow disk end late
EXEC_RETRIES = 100  # 0.1 s: an exec takes less
# --pid: when the first process of a process id namespace dies, the kernel kills all others, orphans included.
_NAMESPACES = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_USER = ("--user", "--map-current-user", "--keep-caps")
_MOVE_IN = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def program(name: str) -> str | None:
    """Return the path of the program `name`, in PATH or SBIN; None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=SBIN)


def path_of(name: str) -> str:
    """Return the path of the program `name`. Raises SlurmError if it is not installed."""
    if (found := program(name)) is None:
        raise SlurmError(f"{name} is missing")
    return found


def own_host(name: str, hosts: Path) -> list[str]:
    """Return the prefix that runs a command with the host name `name`, the hosts file `hosts` and pids of its own."""
    user = () if os.geteuid() == 0 else _AS_USER  # root needs no user namespace
    return ["unshare", *user, *_NAMESPACES, "sh", "-c", _MOVE_IN, str(hosts), name]


def may_have_own_host(hosts: Path) -> bool:
    """Return if this user may run `own_host` on this machine. Containers often forbid namespaces, so it is tried."""
    command = [*own_host("probe", hosts), "true"]
    return program("unshare") is not None and run_silently(command, {"PATH": PATH}, Path("/")) == 0


def processes(directory: Path, name: str = "") -> set[int]:
    """Return the pids of the daemon or node `name` of `directory`, or of all: with job steps and what they run."""
    found, namespaces, others = set(), set(), {}
    own = Path("/proc/self/ns/pid").readlink()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            namespace = (path / "ns/pid").readlink()
            if _belongs(path, directory, name):
                found.add(int(path.name))
                namespaces.add(namespace)
            else:
                others[int(path.name)] = namespace
    # A task may have cleared its environment; it still is in the pid namespace of its node.
    return found | {pid for pid, namespace in others.items() if namespace in namespaces - {own}}


def _belongs(path: Path, directory: Path, name: str) -> bool:
    """Return if the process in `path` is a daemon of the cluster, a job step, or a task of one."""
    variables = set(_environment(path).split(b"\0"))
    marks = re.compile(re.escape(f"{MARK}={directory}/".encode()) + (re.escape(name).encode() if name else b"[^/]+"))
    if any(map(marks.fullmatch, variables)):
        return True
    if (path / "cmdline").read_bytes().startswith(b"slurmstepd: "):  # its title overwrites its environment
        cwd = (path / "cwd").readlink()
        return cwd == directory / name if name else cwd.parent == directory
    node = f"SLURMD_NODENAME={name}".encode()
    return any(text.startswith(f"SLURM_CONF={directory}/".encode()) for text in variables) and any(
        text == node or (not name and text.startswith(node)) for text in variables
    )


def _environment(path: Path) -> bytes:
    """Return the environment of the process in `path`. It is empty during an exec: retry for a while."""
    for _ in range(EXEC_RETRIES):
        if found := (path / "environ").read_bytes():
            return found
        (path / "exe").readlink()  # raises OSError for a process that never has one: a zombie, a kernel thread
        time.sleep(0.001)
    return b""


def kill(directory: Path, name: str = "") -> None:
    """Kill the processes of `name` (of all) at once and wait until they are gone. Raises SlurmError if one stays.

    All are stopped first: otherwise the last one could still report the end of the others to slurmctld.
    """
    deadline = time.monotonic() + KILL_S
    while pids := processes(directory, name):
        if time.monotonic() > deadline:
            raise SlurmError(f"{directory}: processes {sorted(pids)} did not end within {KILL_S:.0f} s of kill -9")
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.01)


def run_silently(command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> int:
    """Run `command` to its end without input and output, and return its exit code."""
    quiet = subprocess.DEVNULL
    ended = subprocess.run(command, env=environment, cwd=cwd, stdin=quiet, stdout=quiet, stderr=quiet, timeout=20)
    return ended.returncode
