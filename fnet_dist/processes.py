"""Processes of this machine: their start times and children, and the environment and end of those that we start."""

import ctypes
import os
import resource
import shlex
import signal
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

CODE_ROOT = Path(__file__).parents[1]  # a checkout, a snapshot of one, or site-packages
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36  # prctl(2)


def is_installed() -> bool:
    """Return True if this code is imported in any directory: the first entry of sys.path depends on the start."""
    return str(CODE_ROOT) in sys.path[1:]


def python_environment() -> dict[str, str]:
    """Return the environment for Python processes that must import the code that runs now."""
    paths = [os.environ.get("PYTHONPATH", "")]
    if not is_installed():  # site-packages before the standard library could hide a part of it
        paths.insert(0, str(CODE_ROOT))
    # `python -m` looks in the current directory first, where another checkout may lie: PYTHONSAFEPATH turns that off.
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def prepare_output() -> None:
    """Let no output fail: open closed standard streams on /dev/null, and replace letters that an encoding lacks.

    A closed descriptor would be given to the next file that is opened, and what is printed would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: `number`
    if sys.stdout is None:  # Python found it closed
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for the process's life
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for the process's life
    for stream in (sys.stdout, sys.stderr):
        # Once: Python takes a stream to be what it was at its start, and a forked process has others.
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def quoted(path: Path) -> str:
    """Return `path` as a shell reads it, for commands that are printed."""
    return shlex.quote(str(path))


def absolute(path: Path) -> Path:
    """Return `path` as an absolute one, by the shell's name of the current directory ($PWD).

    A home that is a symbolic link on this machine alone, /home/me to /export/me, has its first name on other machines.
    """
    path, logical, physical = path.absolute(), Path(os.environ.get("PWD", "")), Path.cwd()
    if logical == physical or not logical.is_absolute() or not logical.exists() or not logical.samefile(physical):
        return path
    while logical.name == physical.name:
        logical, physical = logical.parent, physical.parent
    if not path.is_relative_to(physical):
        return path
    known = next(parent for parent in (path, *path.parents) if parent.exists())  # the rest may be to be created
    named = logical / known.relative_to(physical) if known.is_relative_to(physical) else None
    return named / path.relative_to(known) if named is not None and named.exists() and named.samefile(known) else path


def process_start_ticks(pid: int) -> str | None:
    """Return when process `pid` started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        # proc(5): field 2 is the name in parentheses, which may contain spaces and ")". State is field 3, start 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_running(pid: int) -> bool:
    """Return True if process `pid` runs; False for a zombie too."""
    return process_start_ticks(pid) is not None


def is_others(pid: int) -> bool:
    """Return True if process `pid` exists and is another user's: /proc may hide it (hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def children(pid: int) -> list[int]:
    """Return the child processes of all threads of `pid`, zombies too; an empty list if it is gone."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found += [int(child) for child in listed.read_text().split()]
    return found


def process_start_time(pid: int) -> float | None:
    """Return when process `pid` started, as Unix time in seconds; None if it is gone."""
    if (ticks := process_start_ticks(pid)) is None:
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # this clock counts the time in suspend, as ticks do
    return booted + int(ticks) / os.sysconf("SC_CLK_TCK")


def raise_open_files(needed: int) -> None:
    """Let this process have `needed` open files, or as many as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def exit_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends."""
    # Also after kill -9 of the parent, which then cannot end its children itself.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def set_subreaper(on: bool) -> None:
    """Let this process become the parent of its descendants whose own parent has ended, or no longer."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, on)


def name_process(name: str) -> None:
    """Show `name`, of at most 15 characters, for this process in top and `ps -o comm`."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
