"""Processes of this machine: their start times and children, and the environment and end of those that we start."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

CODE_ROOT = Path(__file__).parents[1]  # a checkout, a snapshot of one, or site-packages
_PR_SET_PDEATHSIG = 1  # prctl(2)


def is_installed() -> bool:
    """Return True if this code is imported in any directory: the first entry of sys.path depends on the start."""
    return str(CODE_ROOT) in sys.path[1:]


def python_environment() -> dict[str, str]:
    """Return the environment for Python processes that must import the code that runs now.

    `python -m` looks in the current directory first, where another checkout may lie: PYTHONSAFEPATH turns that off.
    """
    paths = [os.environ.get("PYTHONPATH", "")]
    if not is_installed():  # site-packages before the standard library could hide a part of it
        paths.insert(0, str(CODE_ROOT))
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def process_start_ticks(pid: int) -> str | None:
    """When process `pid` began, in clock ticks since boot (proc(5), field 22); None if it is gone or a zombie.

    A number can be given to another process later; number and start together cannot.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_running(pid: int) -> bool:
    """Whether process `pid` is there; one that ended and was not waited for is not."""
    return process_start_ticks(pid) is not None


def children(pid: int) -> list[int]:
    """The processes that `pid`, any thread of it, has started and that have not been waited for; none if it is gone."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += [int(child) for child in listed.read_text().split()]
    return found


def process_start_time(pid: int) -> float | None:
    """When process `pid` began, as Unix time in seconds; None if it is gone."""
    ticks = process_start_ticks(pid)
    if ticks is None:
        return None
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.time() - up_s


def exit_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it is gone (PR_SET_PDEATHSIG in prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
