"""Write and read how an attempt and its run ended: end.json and outcome.json."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict, cast

from fnet_dist.errors import FnetError, StorageError, exception_line
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.notices import NoticeLog
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.stop import stop_reason


class Outcome(TypedDict):
    """outcome.json. `status` is finished, stopped or failed; `reason` is a name in fnet_dist/run/stop.py's table."""

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, float | None] | None  # of the last evaluation, "loss" among them; None before the first
    exit_code: int
    launch_id: str | None  # of torchrun: a rank that it restarts after a stop must exit again


@dataclass
class RunOutcomeWriter:
    """The progress of this process group, and the writer of its end.json and of the run's outcome.json."""

    attempt: Attempt | None = None  # None on rank 0 until it is known, and on all other ranks: they write nothing
    owns: bool = True  # False if a launcher claimed the attempt: the launcher then writes end.json
    launch_id: str | None = None
    step: int = 0
    epoch: int = 0
    metrics: dict[str, float | None] | None = None
    finished: str = "finished"  # the reason of a run that ends as planned, or "patience"
    notices: NoticeLog | None = None  # None if nobody is told
    restarts: bool = False  # torchrun starts this rank again if it fails

    def end(self, status: str, reason: str, exit_code: int) -> None:
        """Write outcome.json, then end.json; write nothing if another attempt owns the run or its directory is gone."""
        if self.attempt is None or self.attempt.is_superseded or not self.attempt.run.path.exists():
            return
        progress = {"step": self.step, "epoch": self.epoch, "metrics": self.metrics}
        outcome = {"status": status, "reason": reason, **progress, "exit_code": exit_code, "launch_id": self.launch_id}
        # First outcome.json: after end.json the next attempt may begin, and it removes the old outcome.json.
        write_json(self.attempt.run.outcome, outcome)
        if self.owns:
            end_attempt(self.attempt, reason, self.step, exit_code)
        # The STOP file was honoured, or came too late. Where Slurm starts the job again, it is kept: it may have come
        # while the run saved after Slurm's warning, and the next start must find it.
        if status != "failed" and stop_reason(reason).slurm == "end":
            self.attempt.run.stop.unlink(missing_ok=True)

    def note_end(self, status: str, reason: str, message: str) -> None:
        """Add a notice of a failure or a stop, unless a launcher does, or torchrun restarts what failed."""
        if self.notices is None or not self.owns:
            return
        if status == "stopped":
            self.notices.add_end("stopped", reason, self.step)
        elif status == "failed" and not self.restarts:
            self.notices.add_end("failed", reason, self.step, message)


def end_attempt(
    attempt: Attempt, reason: str, step: int, exit_code: int, *, restarts: bool = False, **more: object
) -> None:
    """Write end.json, which gives the run up; `restarts`: the same launcher begins another attempt.

    `more` is what a launcher knows: `failure` (AttemptFailure) and `replay`, see README.md ("Restarts and owners").
    It adds `preempted` if it learns later that Slurm's warning was that of a preemption.
    """
    end = {"reason": reason, "step": step, "exit_code": exit_code, "restarts": restarts, "time": time.time(), **more}
    attempt.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
    write_json(attempt.end, end)


@contextmanager
def record_outcome(progress: RunOutcomeWriter) -> Iterator[None]:
    """Write how the run ended when the block ends, whether it returns or raises."""
    try:
        yield
    except BaseException as error:
        progress.end(*classify_error(error))
        raise
    progress.end("finished", progress.finished, 0)


@contextmanager
def note_failures(progress: RunOutcomeWriter) -> Iterator[None]:
    """Add a notice if the block is left by an error; a stop is one. Before the end of the tracking process."""
    try:
        yield
    except BaseException as error:
        status, reason, _ = classify_error(error)
        progress.note_end(status, reason, str(error) if isinstance(error, FnetError) else exception_line(error))
        raise


def classify_error(error: BaseException) -> tuple[str, str, int]:
    """Return status, reason and exit code of an error."""
    if isinstance(error, OSError):  # not wrapped in a StorageError: any read or write may raise it
        return "failed", StorageError.reason, StorageError.exit_code
    if isinstance(error, FnetError):
        return stop_reason(error.reason).status, error.reason, error.exit_code
    # A second Ctrl-C ended the process at once: nothing was saved, so it is no "stopped".
    reason = stop_reason("signal_int" if isinstance(error, KeyboardInterrupt) else "crash")
    return "failed", reason.name, reason.exit_code


def read_outcome(run: RunDir) -> Outcome | None:
    """Return how the run ended, or None as long as it has not."""
    return cast(Outcome | None, read_json(run.outcome))
