"""One rank's part in an answer to `fnet ask`: its threads' Python stacks, or a profile of its steps.

What goes wrong, as on a full disk, is told in the answer and never ends the run.
"""

import gzip
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fnet_dist.data.sampler import StepBatch
from fnet_dist.errors import describe, exception_line
from fnet_dist.training.window import MAX_WINDOW_STEPS

TOO_LATE = "training ended first"
LONGEST = 10  # operations in a profile's table


def error_of(write: Callable[[], object]) -> str:
    """Return the error of `write()` in one line; "" if it has none."""
    try:
        write()
    except OSError as error:
        return describe(error)
    except Exception as error:  # of the profiler
        return exception_line(error)
    return ""


class StackDump:
    """Writes the stacks of all threads to `path` (None: does nothing), `delay_s` after the next window has begun."""

    steps = None

    def __init__(self, path: Path | None, title: str, delay_s: float) -> None:
        self._path = path
        self._title = title
        self._error = "" if path is None else TOO_LATE
        self._timer = threading.Timer(delay_s, self._write)
        self._timer.name, self._timer.daemon = "stacks", True

    def begin_window(self, step: int) -> int:
        """Start to wait; return the number of steps that the window after `step` may have."""
        if self._path is not None and self._timer.ident is None and (error := error_of(self._timer.start)):
            self._error = error  # there is no room for another thread
        return MAX_WINDOW_STEPS

    def is_busy(self, room: int) -> bool:
        """Return True as long as the stacks are not written."""
        return self._timer.is_alive()

    def end(self) -> str:
        """Wait no longer; return the error, "" if there is none."""
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()
        return self._error

    def _write(self) -> None:
        assert self._path is not None
        path = self._path

        def write() -> None:
            text = f"{self._title}\n\n{stacks()}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

        self._error = error_of(write)


def stacks() -> str:
    """Return the Python stack of every thread but this one, under the thread's name; the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = threading.get_ident()
    # Not faulthandler: before Python 3.14 it knows no names. The frames change as soon as their thread runs again; the
    # walk is over before (sys.getswitchinterval), and source lines are read only afterwards.
    found = [
        (names.get(ident, f"{ident}"), traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))
        for ident, frame in sys._current_frames().items()
        if ident != mine
    ]
    found.sort(key=lambda thread: thread[0] != threading.main_thread().name)
    return "\n".join(f"thread {name}:\n{''.join(reversed(stack.format()))}" for name, stack in found)


class StepProfile:
    """Profiles the next `count` steps, in windows of their own, to files that begin with `path` (None: only waits).

    It ends early before an evaluation or at the end of an epoch: those would be in the profile, with far more events.
    """

    def __init__(self, path: Path | None, count: int, device: torch.device) -> None:
        self.steps: tuple[int, int] | None = None  # the first and the last
        self._path, self._left, self._device = path, count, device
        self._error = ""
        self._profiler: torch.profiler.profile | None = None

    def begin_window(self, step: int) -> int:
        """Start the profiler before the first step; return the number of steps that the window may have."""
        if self.steps is None and self._path is not None:
            self._error = error_of(self._start)
        return self._left

    def marked(self, batches: Sequence[StepBatch], step: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps after `step`; each step is an event in the profile, with its number."""
        self._left -= len(batches)
        self.steps = (step + 1 if self.steps is None else self.steps[0], step + len(batches))
        for number, batch in enumerate(batches, start=step + 1):
            with torch.profiler.record_function(f"ProfilerStep#{number}"):  # a name that viewers of traces know
                yield batch

    def is_busy(self, room: int) -> bool:
        """Return True as long as steps are to come; with a `room` of 0, an evaluation or another epoch comes first."""
        return self._left > 0 and room > 0

    def end(self) -> str:
        """Write trace and table; return the error, "" if there is none."""
        if self.steps is None:
            return TOO_LATE
        if self._profiler is not None:
            self._error = error_of(self._profiler.stop) or error_of(self._write)
        return self._error

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports an error where there is no GPU
        profiler = torch.profiler.profile(activities=activities, acc_events=True)  # without it, torch 2.11 warns
        profiler.start()
        self._profiler = profiler

    def _write(self) -> None:
        assert self._path is not None
        assert self._profiler is not None
        self._path.parent.mkdir(exist_ok=True)
        sort_by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=sort_by, row_limit=LONGEST)
        Path(f"{self._path}.operations.txt").write_text(table, encoding="utf-8")
        trace = Path(f"{self._path}.trace.json")
        try:
            # By ourselves: torch would first write it to /tmp, and on a full disk it writes nothing and raises nothing.
            self._profiler.export_chrome_trace(str(trace))
            if not trace.exists():
                raise OSError(f"{trace} not written; is the disk full?")
            with trace.open("rb") as source, gzip.open(f"{trace}.gz", "wb") as target:
                shutil.copyfileobj(source, target)
        finally:
            for left in (trace, Path(f"{trace}.tmp")):
                left.unlink(missing_ok=True)
