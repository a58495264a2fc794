"""Attempts: one process group's turn at a run. The number is claimed with mkdir, which only one can win."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.errors import ConfigError, FnetError, StorageError
from fnet_dist.run_dir import Outcome, RunDir, read_json, write_json


@dataclass(frozen=True)
class Attempt:
    """A claimed attempt; `number` counts from 1."""

    run: RunDir
    number: int

    @property
    def begin(self) -> Path:
        return self.run.attempt(self.number) / "begin.json"

    @property
    def end(self) -> Path:
        return self.run.attempt(self.number) / "end.json"


def claim_attempt(run: RunDir, world_size: int, settings: Any) -> Attempt:
    """Claim the number after the highest there is; begin.json says who holds it, and with which settings.

    Raises ConfigError, naming host and pid, if the last one's owner may still be alive: taking over comes with
    resuming.
    """
    last = last_attempt(run)
    if last is not None and not last.end.exists() and not _is_gone(owner := read_json(last.begin) or {}):
        raise ConfigError(
            f"{run.path} is owned by attempt {last.number}: pid {owner.get('pid', '?')} on {owner.get('host', '?')}, "
            f"since {owner.get('since', '?')}; wait for it, or use another --run.name"
        )
    attempt = Attempt(run, 1 if last is None else last.number + 1)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.attempts.mkdir(exist_ok=True)
    try:
        attempt.begin.parent.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"{run.path}: another start claimed attempt {attempt.number} at the same moment; wait for it, or use "
            "another --run.name"
        ) from None
    begin = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": _process_started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "time": time.time(),
        "slurm_job_id": None,
        "slurm_restart_count": None,
        "address": None,
        "world_size": world_size,
        "settings": settings,
    }
    write_json(attempt.begin, begin)
    return attempt


def last_attempt(run: RunDir) -> Attempt | None:
    """The attempt with the highest number, or None before the first."""
    numbers = [int(path.name) for path in run.attempts.glob("[0-9]*") if path.name.isdigit()]
    return Attempt(run, max(numbers)) if numbers else None


@dataclass
class Progress:
    """How far this process group has come, for its end.json and the run's outcome.json.

    `attempt` is set on rank 0 alone, once it is claimed: the other ranks write nothing.
    """

    attempt: Attempt | None = None
    step: int = 0
    epoch: int = 0
    test_accuracy: float | None = None

    def end(self, status: str, reason: str, exit_code: int) -> None:
        """Write the run's outcome.json, then the attempt's end.json."""
        if self.attempt is None:
            return
        outcome: Outcome = {
            "status": status,
            "reason": reason,
            "step": self.step,
            "epoch": self.epoch,
            "test_accuracy": self.test_accuracy,
            "exit_code": exit_code,
            "launch_id": None,
        }
        write_json(self.attempt.run.outcome, outcome)
        end = {"reason": reason, "step": self.step, "exit_code": exit_code, "time": time.time()}
        write_json(self.attempt.end, end)


@contextmanager
def ending(progress: Progress) -> Iterator[None]:
    """Write how the run ended, whichever way the block ends."""
    try:
        yield
    except BaseException as error:
        progress.end(*_explain(error))
        raise
    progress.end("finished", "finished", 0)


def _explain(error: BaseException) -> tuple[str, str, int]:
    """Status, reason and exit code of an error."""
    if isinstance(error, OSError):
        return "failed", StorageError.reason, StorageError.exit_code
    if isinstance(error, FnetError):
        return ("stopped" if error.reason.startswith("signal_") else "failed"), error.reason, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "signal_int", 130
    return "failed", "crash", 1


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote this begin.json is known to be gone; on another host nobody can tell."""
    if owner.get("host") != socket.gethostname():
        return False
    return _process_started(owner["pid"]) is None or _process_started(owner["pid"]) != owner["pid_started"]


def _process_started(pid: int) -> str | None:
    """When process `pid` began, in clock ticks since boot (proc(5), field 22); None if there is no such process.

    A number can be given to another process later; number and start together cannot.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
