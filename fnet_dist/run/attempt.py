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

from fnet_dist.errors import ConfigError, LostOwnershipError
from fnet_dist.processes import process_start_ticks
from fnet_dist.run.run_dir import RunDir, mtime, read_json, write_json
from fnet_dist.run.stop import AGREED_STOPS, StopRequested

HEARTBEAT_EVERY_S = 1.0
STALE_S = 30.0  # an owner whose `alive` stands still for so long, by the watcher's own clock, is taken for dead


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
    def heartbeat(self) -> Path:
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
            raise self.lost_ownership_error()

    def lost_ownership_error(self) -> LostOwnershipError:
        """What to raise when a later attempt owns the run."""
        return LostOwnershipError(
            f"attempt {self.number + 1} has taken {self.run.path} over; attempt {self.number} writes nothing more"
        )


def claim_attempt(
    run: RunDir, asked: Callable[[], str] = lambda: "", committed_step: Callable[[], int] = lambda: 0, **begin: Any
) -> Attempt:
    """Claim the number after the highest there is; begin.json says who holds it, with what `begin` adds.

    An owner in an earlier start of the same Slurm job (`slurm_job_id`, `slurm_restart_count`) is gone, or cut off.

    A directory that holds begin.json already is renamed into place, which only one can win and nobody sees half done.
    Waits while it is not known whether the last owner lives: up to STALE_S. Raises ConfigError, naming host and pid,
    if it does, and AskedToStop if `asked` gives a reason meanwhile.
    """
    last = _wait_for_owner(run, asked, begin)  # one look: between two, another start could claim and be followed
    attempt = Attempt(run, 1 if last is None else last.number + 1)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.attempts.mkdir(exist_ok=True)
    who = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_started": process_start_ticks(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "time": time.time(),
        "slurm_job_id": None,
        "slurm_restart_count": None,
        "address": None,
        "committed_step": committed_step(),  # after the wait: the last owner may have saved meanwhile
    }
    with tempfile.TemporaryDirectory(dir=run.attempts, prefix=".claim-", ignore_cleanup_errors=True) as claim:
        mine = Path(claim) / "mine"
        mine.mkdir()
        write_json(mine / attempt.begin.name, who | begin)
        (mine / attempt.heartbeat.name).write_text("0")
        try:
            mine.rename(attempt.begin.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ConfigError(owner_message(attempt)) from None
    return attempt


@contextmanager
def heartbeat_thread(attempt: Attempt) -> Iterator[None]:
    """Inside, a thread changes the attempt's `alive` every second: whoever waits for the run sees that it is owned."""
    ended = threading.Event()

    def touch() -> None:
        count = 0
        while not ended.wait(HEARTBEAT_EVERY_S):
            count += 1
            # A disk may be full for a while; if the directory has gone, the next commit says so.
            with suppress(OSError):
                descriptor = os.open(attempt.heartbeat, os.O_WRONLY)
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


def list_attempts(run: RunDir) -> list[Attempt]:
    """All attempts, in order."""
    numbers = [int(path.name) for path in run.attempts.glob("[0-9]*") if path.name.isdigit()]
    return [Attempt(run, number) for number in sorted(numbers)]


def last_attempt(run: RunDir) -> Attempt | None:
    """The attempt with the highest number, or None before the first."""
    return next(reversed(list_attempts(run)), None)


def count_stalled_attempts(run: RunDir, committed_step: int, also: Collection[str] = ()) -> int:
    """How many attempts in a row, up to the last, have ended without a new checkpoint after `committed_step`.

    Attempts that ended because somebody asked do not count, but for the reasons `also`, nor those that Slurm ended
    without a word to start their job again.
    """
    count, later = 0, dict[str, Any]()
    for attempt in reversed(list_attempts(run)):
        begin = read_json(attempt.begin)
        if begin is None or begin["committed_step"] < committed_step:
            break
        end = read_json(attempt.end)
        agreed = end is not None and end["reason"] in AGREED_STOPS and end["reason"] not in also
        count += not agreed and not (end is None and _restarts(begin, later))
        later = begin
    return count


def _wait_for_owner(run: RunDir, asked: Callable[[], str], begin: Mapping[str, Any]) -> Attempt | None:
    """The last attempt, once it is known to be over. Raises ConfigError if its owner lives, or AskedToStop."""
    last = last_attempt(run)
    if last is None:
        return None
    owner = read_json(last.begin)
    seen, began = _read_alive(last), time.monotonic()
    while not last.end.exists() and not owner_has_exited(owner) and not _restarts(owner, begin):
        if reason := asked():
            raise StopRequested(reason)
        if last.is_superseded:
            return _wait_for_owner(run, asked, begin)
        if _read_alive(last) != seen:
            raise ConfigError(owner_message(last))
        if time.monotonic() - began > STALE_S:
            break
        time.sleep(HEARTBEAT_EVERY_S / 5)
    return last


def _restarts(owner: Mapping[str, Any], begin: Mapping[str, Any]) -> bool:
    """Whether Slurm has started again, as what `begin` says, the job that `owner` belonged to."""
    job = begin.get("slurm_job_id")
    return (
        job is not None and job == owner["slurm_job_id"] and begin["slurm_restart_count"] > owner["slurm_restart_count"]
    )


def _read_alive(attempt: Attempt) -> str | None:
    try:
        return attempt.heartbeat.read_text()  # opening asks a shared file system anew; its times may be old
    except OSError:
        return None


def owner_message(attempt: Attempt) -> str:
    """What to tell somebody who wants the run while `attempt` has it."""
    run, owner = attempt.run, read_json(attempt.begin)
    job = f" in Slurm job {owner['slurm_job_id']}" if owner["slurm_job_id"] else ""
    return (
        f"{run.path} is owned by attempt {attempt.number}: pid {owner['pid']} on {owner['host']}{job}, since "
        f"{owner['since']}; wait for it, end it with `python -m jobs stop {run.path}`, or use another --run.name"
    )


def owner_has_exited(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote this begin.json is known to be gone; on another machine nobody can tell."""
    if (owner["host"], owner["machine"]) != (socket.gethostname(), _machine()):
        return False
    return process_start_ticks(owner["pid"]) is None or process_start_ticks(owner["pid"]) != owner["pid_started"]


def is_alive(attempt: Attempt) -> bool:
    """Whether somebody is at work on it, as far as one look can tell: its process on this machine, elsewhere a recent
    sign of life; between two attempts of a launcher too."""
    end = read_json(attempt.end)
    if (end is not None and not end["restarts"]) or owner_has_exited(read_json(attempt.begin)):
        return False
    return time.time() - mtime(attempt.heartbeat) < STALE_S


def _machine() -> str:
    """This boot of this machine and this space of process ids: host names are alike in many containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
