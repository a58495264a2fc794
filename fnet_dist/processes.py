"""Processes of this machine: when one began, its children, and how it ends with its parent."""

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


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
