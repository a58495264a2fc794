"""Attempts: one process group's turn at a run. Who may start, who owns it, and how it ended."""

import errno
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.config import Config
from fnet_dist.errors import ConfigError, FnetError, StorageError
from fnet_dist.run_dir import Outcome, RunDir, read_json, read_outcome, run_of, write_json
from fnet_dist.settings import differences


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


def check_run(config: Config) -> Outcome | None:
    """The outcome of the run that `config` names if it is finished already; None if there is nothing yet.

    Reads only. Raises ConfigError if the directory belongs to other settings or holds training that has not ended:
    until resuming exists, that cannot be continued, and nothing is ever overwritten.
    """
    run = run_of(config)
    stored = read_json(run.config)
    if stored is None:
        return None
    other_name = f"use --run.name {config.run.name}-2 for a new run"
    if changed := differences(stored, config):
        raise ConfigError(f"{run.path} holds a run with other settings ({'; '.join(changed)}); {other_name}")
    outcome = read_outcome(run)
    if outcome is not None and outcome["status"] == "finished":
        before, now = (_length(settings["run"]) for settings in (stored, config.model_dump()))
        if now[0] > before[0] or now[1] > before[1]:
            raise ConfigError(
                f"{run.path} was finished at step {outcome['step']:,}; to go on needs resuming, which does not "
                f"exist yet; {other_name}"
            )
        return outcome
    refuse_living_owner(run)
    if run.ledger.exists() and run.ledger.stat().st_size > 0:
        raise ConfigError(
            f"{run.path} holds an unfinished run, and resuming does not exist yet; {other_name}, or rm -r {run.path}"
        )
    return None


def claim_attempt(run: RunDir, world_size: int, settings: Any) -> Attempt:
    """Claim the number after the highest there is; begin.json says who holds it, and with which settings.

    A directory that holds begin.json already is renamed into place, which only one can win and nobody sees half done.
    Raises ConfigError, naming host and pid, if the last one's owner may still be alive: taking over comes with
    resuming.
    """
    last = refuse_living_owner(run)  # one look: between two, another start could claim and be followed
    attempt = Attempt(run, 1 if last is None else last.number + 1)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.attempts.mkdir(exist_ok=True)
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
    with tempfile.TemporaryDirectory(dir=run.attempts, prefix=".claim-", ignore_cleanup_errors=True) as claim:
        mine = Path(claim) / "mine"
        mine.mkdir()
        write_json(mine / attempt.begin.name, begin)
        try:
            mine.rename(attempt.begin.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            refuse_living_owner(run)
            raise ConfigError(
                f"{run.path}: attempt {attempt.number} was held by another start meanwhile; try again"
            ) from None
    return attempt


def refuse_living_owner(run: RunDir) -> Attempt | None:
    """The last attempt, if any. Raises ConfigError, naming it, if it has not ended and its owner may be alive."""
    last = last_attempt(run)
    if last is not None and not last.end.exists() and not _is_gone(owner := read_json(last.begin)):
        raise ConfigError(
            f"{run.path} is owned by attempt {last.number}: pid {owner['pid']} on {owner['host']}, since "
            f"{owner['since']}; wait for it, or use another --run.name"
        )
    return last


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


def _length(run: Mapping[str, Any]) -> tuple[int, float]:
    """How long a run is to be, for comparing: its epochs, and its max_steps, where none is without end."""
    return run["epochs"], math.inf if run["max_steps"] is None else run["max_steps"]
