"""The processes of a private Slurm: started without a parent, found again in /proc, ended. No list of pids is kept.

Each daemon carries MARK in its environment, so a number that another process got later is never taken for it.
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
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # not in an ordinary user's PATH
PATH = f"{SBIN}:/usr/local/bin:/usr/bin:/bin"
GONE_S = 10.0
EXEC_LOOKS = 100
# A process id space of its own: killing its first process is a power cut, orphans included.
_SPACES = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_USER = ("--user", "--map-current-user", "--keep-caps")
_MOVE_IN = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def program(name: str) -> str | None:
    """Where the program `name` is, in PATH or where Debian puts daemons; None if nowhere."""
    return shutil.which(name) or shutil.which(name, path=SBIN)


def path_of(name: str) -> str:
    """Where the program `name` is. Raises SlurmError if it is nowhere."""
    found = program(name)
    if found is None:
        raise SlurmError(f"{name} is missing")
    return found


def own_host(name: str, hosts: Path) -> list[str]:
    """The words before a command that give it the host name `name`, the names in `hosts` and its own process ids."""
    user = () if os.geteuid() == 0 else _AS_USER
    return ["unshare", *user, *_SPACES, "sh", "-c", _MOVE_IN, str(hosts), name]


def may_have_own_host(hosts: Path) -> bool:
    """Whether this user may do `own_host` on this machine, by trying it."""
    words = [*own_host("tried", hosts), "true"]
    return program("unshare") is not None and _silent(words, {"PATH": PATH}, Path("/")) == 0


def launch(directory: Path, name: str, words: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
    """Start `words` as the daemon `name` of `directory`, a child of nobody here; what it says goes to its log."""
    marked = {"PATH": PATH, **environment, MARK: f"{directory}/{name}"}
    script = 'exec >>"$0" 2>&1 </dev/null; setsid "$@" &'
    _silent(["sh", "-c", script, str(log_of(directory, name)), *words], marked, cwd)


def log_of(directory: Path, name: str) -> Path:
    """Where the daemon `name` of `directory` writes what it prints."""
    return directory / "log" / name


def processes(directory: Path, name: str = "") -> set[int]:
    """The processes of the daemon or node `name` of `directory`, or of all: job steps and what they run included."""
    found, spaces, rest = set(), set(), {}
    own = Path("/proc/self/ns/pid").readlink()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            space = (path / "ns/pid").readlink()
            if _belongs(path, directory, name):
                found.add(int(path.name))
                spaces.add(space)
            else:
                rest[int(path.name)] = space
    return found | {pid for pid, space in rest.items() if space in spaces - {own}}


def _belongs(path: Path, directory: Path, name: str) -> bool:
    """Whether the process in `path` is a daemon of ours, a job step (its title hides its environment) or its task."""
    variables = set(_environment(path).split(b"\0"))
    marks = re.compile(re.escape(f"{MARK}={directory}/".encode()) + (re.escape(name).encode() if name else b"[^/]+"))
    if any(map(marks.fullmatch, variables)):
        return True
    if (path / "cmdline").read_bytes().startswith(b"slurmstepd: "):
        cwd = (path / "cwd").readlink()
        return cwd == directory / name if name else cwd.parent == directory
    if not any(each.startswith(f"SLURM_CONF={directory}/".encode()) for each in variables):
        return False
    node = next((each.partition(b"=")[2].decode() for each in variables if each.startswith(b"SLURMD_NODENAME=")), None)
    return node == name if name else node is not None


def _environment(path: Path) -> bytes:
    """The environment of the process in `path`. While it execs there is none to be read: then again, for a while."""
    for _ in range(EXEC_LOOKS):
        if found := (path / "environ").read_bytes():
            return found
        (path / "exe").readlink()  # an OSError for what has none: a process that has ended, or the kernel's own
        time.sleep(0.001)
    return b""


def title(pid: int) -> list[str]:
    """The words of a process's command line, as it shows itself; none if it has ended."""
    try:
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .rstrip(b"\0")
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .split()
        )
    except OSError:
        return []


def kill(directory: Path, name: str = "") -> None:
    """Kill the processes of `name` (of all) at once and see them gone. Raises SlurmError if one stays.

    All are stopped first: killed one by one, the last could still tell slurmctld of the end of the others.
    """
    deadline = time.monotonic() + GONE_S
    while pids := processes(directory, name):
        if time.monotonic() > deadline:
            raise SlurmError(f"{directory}: processes {sorted(pids)} did not end within {GONE_S:.0f} s of kill -9")
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.01)


def _silent(words: Sequence[str], environment: Mapping[str, str], cwd: Path) -> int:
    quiet = subprocess.DEVNULL
    return subprocess.run(
        words, env=environment, cwd=cwd, stdin=quiet, stdout=quiet, stderr=quiet, timeout=20
    ).returncode
