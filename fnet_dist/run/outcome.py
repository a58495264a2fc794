"""How an attempt and its run ended: outcome.json and end.json."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

from fnet_dist.errors import FnetError, StorageError
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.stop import AGREED_STOPS, GOES_ON


@dataclass
class RunOutcomeWriter:
    """How far this process group has come, for its end.json and the run's outcome.json.

    `attempt` is set on rank 0 alone, once it is known: the other ranks write nothing. `owns` says that this process
    claimed it, and not a launcher, which then writes end.json.
    """

    attempt: Attempt | None = None
    owns: bool = True
    launch_id: str | None = None
    step: int = 0
    epoch: int = 0
    test_accuracy: float | None = None

    def end(self, status: str, reason: str, exit_code: int) -> None:
        """Write the run's outcome.json, then the attempt's end.json; nothing if the run is another's by now."""
        if self.attempt is None or self.attempt.is_superseded or not self.attempt.begin.exists():
            return
        outcome: Outcome = {
            "status": status,
            "reason": reason,
            "step": self.step,
            "epoch": self.epoch,
            "test_accuracy": self.test_accuracy,
            "exit_code": exit_code,
            "launch_id": self.launch_id,
        }
        write_json(self.attempt.run.outcome, outcome)
        if self.owns:
            end_attempt(self.attempt, reason, self.step, exit_code)
        if status != "failed" and reason not in GOES_ON:  # there, the next start is to find it
            self.attempt.run.stop.unlink(missing_ok=True)  # honoured, or too late


def end_attempt(attempt: Attempt, reason: str, step: int, exit_code: int, *, restarts: bool = False) -> None:
    """Write end.json: the attempt owns nothing any more. `restarts` says that its launcher begins another one."""
    end = {"reason": reason, "step": step, "exit_code": exit_code, "restarts": restarts, "time": time.time()}
    write_json(attempt.end, end)


@contextmanager
def record_outcome(progress: RunOutcomeWriter) -> Iterator[None]:
    """Write how the run ended, whichever way the block ends."""
    try:
        yield
    except BaseException as error:
        progress.end(*classify_error(error))
        raise
    progress.end("finished", "finished", 0)


def classify_error(error: BaseException) -> tuple[str, str, int]:
    """Status, reason and exit code of an error."""
    if isinstance(error, OSError):
        return "failed", StorageError.reason, StorageError.exit_code
    if isinstance(error, FnetError):
        return ("stopped" if error.reason in AGREED_STOPS else "failed"), error.reason, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "failed", "signal_int", 130
    return "failed", "crash", 1


class Outcome(TypedDict):
    """outcome.json. `status` is finished, stopped or failed; `reason` is one of the words in fnet_dist/README.md."""

    status: str
    reason: str
    step: int
    epoch: int
    test_accuracy: float | None
    exit_code: int
    launch_id: str | None


def read_outcome(run: RunDir) -> Outcome | None:
    """How the run ended, or None while it has not."""
    outcome: Outcome | None = read_json(run.outcome)
    return outcome
