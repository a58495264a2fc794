"""Attempts: one process group's turn at a run. Who may start, who owns it, and how it ended.

An attempt's number is its fencing token: whoever finds a higher one has lost the run and writes nothing more.
"""

import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.distributed.launch_env import process_ticks
from fnet_dist.errors import ConfigError, FnetError, LostOwnershipError, StorageError
from fnet_dist.run.run_dir import Outcome, RunDir, read_json, write_json, written
from fnet_dist.run.stop import GOES_ON, REASONS, AskedToStop

ALIVE_EVERY_S = 1.0
STALE_S = 30.0  # an owner whose `alive` stands still for so long, by the watcher's own clock, is taken for dead
AGREED_STOPS = frozenset(REASONS) - {"", "lost_ownership"}


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

    @property
    def alive(self) -> Path:
        return self.run.attempt(self.number) / "alive"

    def log(self, rank: int) -> Path:
        """What `rank` printed."""
        return self.run.attempt(self.number) / f"rank_{rank}.log"

    def error(self, rank: int) -> Path:
        """Why `rank` failed, in its own words: torchrun's error file."""
        return self.run.attempt(self.number) / f"rank_{rank}.error"

    @property
    def tracking_log(self) -> Path:
        """What the W&B SDK printed in rank 0's tracking process."""
        return self.run.attempt(self.number) / "wandb.log"

    @property
    def is_superseded(self) -> bool:
        """Whether somebody has claimed the run since: numbers are given out one after the other."""
        return self.run.attempt(self.number + 1).exists()

    def check(self) -> None:
        """Raise LostOwnershipError if the run is another's by now: called before whatever is committed."""
        if self.is_superseded:
            raise self.lost()

    def lost(self) -> LostOwnershipError:
        """What to raise when a later attempt owns the run."""
        return LostOwnershipError(
            f"attempt {self.number + 1} has taken {self.run.path} over; attempt {self.number} writes nothing more"
        )


def claim_attempt(run: RunDir, asked: Callable[[], str] = lambda: "", **begin: Any) -> Attempt:
    """Claim the number after the highest there is; begin.json says who holds it, with what `begin` adds.

    An owner in an earlier start of the same Slurm job (`slurm_job_id`, `slurm_restart_count`) is gone, or cut off.

    A directory that holds begin.json already is renamed into place, which only one can win and nobody sees half done.
    Waits while it is not known whether the last owner lives: up to STALE_S. Raises ConfigError, naming host and pid,
    if it does, and AskedToStop if `asked` gives a reason meanwhile.
    """
    last = _wait_for_turn(run, asked, begin)  # one look: between two, another start could claim and be followed
    attempt = Attempt(run, 1 if last is None else last.number + 1)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.attempts.mkdir(exist_ok=True)
    who = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_started": process_ticks(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "time": time.time(),
        "slurm_job_id": None,
        "slurm_restart_count": None,
        "address": None,
        "committed_step": next(iter(checkpoint_steps(run)), 0),
    }
    with tempfile.TemporaryDirectory(dir=run.attempts, prefix=".claim-", ignore_cleanup_errors=True) as claim:
        mine = Path(claim) / "mine"
        mine.mkdir()
        write_json(mine / attempt.begin.name, who | begin)
        (mine / attempt.alive.name).write_text("0")
        try:
            mine.rename(attempt.begin.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ConfigError(owned_by(attempt)) from None
    return attempt


@contextmanager
def kept_alive(attempt: Attempt) -> Iterator[None]:
    """Inside, a thread changes the attempt's `alive` every second: whoever waits for the run sees that it is owned."""
    ended = threading.Event()

    def touch() -> None:
        count = 0
        while not ended.wait(ALIVE_EVERY_S):
            count += 1
            # A disk may be full for a while; if the directory has gone, the next commit says so.
            with suppress(OSError):
                descriptor = os.open(attempt.alive, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, str(count).encode(), 0)
                finally:
                    os.close(descriptor)  # NFS sends it now; others see what they open afterwards

    thread = threading.Thread(target=touch, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def attempts_of(run: RunDir) -> list[Attempt]:
    """All attempts, in order."""
    numbers = [int(path.name) for path in run.attempts.glob("[0-9]*") if path.name.isdigit()]
    return [Attempt(run, number) for number in sorted(numbers)]


def last_attempt(run: RunDir) -> Attempt | None:
    """The attempt with the highest number, or None before the first."""
    return next(reversed(attempts_of(run)), None)


def stalled_attempts(run: RunDir, committed_step: int, also: Collection[str] = ()) -> int:
    """How many attempts in a row, up to the last, have ended without a new checkpoint after `committed_step`.

    Attempts that ended because somebody asked do not count, but for the reasons `also`, nor those that Slurm ended
    without a word to start their job again.
    """
    count, later = 0, dict[str, Any]()
    for attempt in reversed(attempts_of(run)):
        begin = read_json(attempt.begin)
        if begin is None or begin["committed_step"] < committed_step:
            break
        end = read_json(attempt.end)
        agreed = end is not None and end["reason"] in AGREED_STOPS and end["reason"] not in also
        count += not agreed and not (end is None and _restarts(begin, later))
        later = begin
    return count


@dataclass
class Progress:
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
def ending(progress: Progress) -> Iterator[None]:
    """Write how the run ended, whichever way the block ends."""
    try:
        yield
    except BaseException as error:
        progress.end(*explain(error))
        raise
    progress.end("finished", "finished", 0)


def explain(error: BaseException) -> tuple[str, str, int]:
    """Status, reason and exit code of an error."""
    if isinstance(error, OSError):
        return "failed", StorageError.reason, StorageError.exit_code
    if isinstance(error, FnetError):
        return ("stopped" if error.reason in AGREED_STOPS else "failed"), error.reason, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "failed", "signal_int", 130
    return "failed", "crash", 1


def _wait_for_turn(run: RunDir, asked: Callable[[], str], begin: Mapping[str, Any]) -> Attempt | None:
    """The last attempt, once it is known to be over. Raises ConfigError if its owner lives, or AskedToStop."""
    last = last_attempt(run)
    if last is None:
        return None
    owner = read_json(last.begin)
    seen, began = _read_alive(last), time.monotonic()
    while not last.end.exists() and not is_gone(owner) and not _restarts(owner, begin):
        if reason := asked():
            raise AskedToStop(reason)
        if last.is_superseded:
            return _wait_for_turn(run, asked, begin)
        if _read_alive(last) != seen:
            raise ConfigError(owned_by(last))
        if time.monotonic() - began > STALE_S:
            break
        time.sleep(ALIVE_EVERY_S / 5)
    return last


def _restarts(owner: Mapping[str, Any], begin: Mapping[str, Any]) -> bool:
    """Whether Slurm has started again, as what `begin` says, the job that `owner` belonged to."""
    job = begin.get("slurm_job_id")
    return (
        job is not None and job == owner["slurm_job_id"] and begin["slurm_restart_count"] > owner["slurm_restart_count"]
    )


def _read_alive(attempt: Attempt) -> str | None:
    try:
        return attempt.alive.read_text()  # opening asks a shared file system anew; its times may be old
    except OSError:
        return None


def owned_by(attempt: Attempt) -> str:
    """What to tell somebody who wants the run while `attempt` has it."""
    run, owner = attempt.run, read_json(attempt.begin)
    job = f" in Slurm job {owner['slurm_job_id']}" if owner["slurm_job_id"] else ""
    return (
        f"{run.path} is owned by attempt {attempt.number}: pid {owner['pid']} on {owner['host']}{job}, since "
        f"{owner['since']}; wait for it, end it with `python -m jobs stop {run.path}`, or use another --run.name"
    )


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote this begin.json is known to be gone; on another machine nobody can tell."""
    if (owner["host"], owner["machine"]) != (socket.gethostname(), _machine()):
        return False
    return process_ticks(owner["pid"]) is None or process_ticks(owner["pid"]) != owner["pid_started"]


def is_living(attempt: Attempt) -> bool:
    """Whether somebody is at work on it, as far as one look can tell: its process on this machine, elsewhere a recent
    sign of life; between two attempts of a launcher too."""
    end = read_json(attempt.end)
    if (end is not None and not end["restarts"]) or is_gone(read_json(attempt.begin)):
        return False
    return time.time() - written(attempt.alive) < STALE_S


def _machine() -> str:
    """This boot of this machine and this space of process ids: host names are alike in many containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
