"""Attempts: who owns a run, and who may start it.

An attempt is one process group's work on a run. Its number is a fencing token: whoever finds a higher number no longer
owns the run and writes nothing more. The protocol:

1. Claim. A start makes a directory that holds begin.json and renames it to attempts/<number>. Only one rename can win,
   and no reader sees the directory without begin.json.
2. Heartbeat. The owner changes the file `alive` every HEARTBEAT_EVERY_S seconds.
3. Check. Before each commit the owner looks for a higher number (`Attempt.check`).
4. End. The owner writes end.json, which gives the run up.
5. Takeover. Another start may claim the next number if end.json exists, if the owner's process is known to be gone, if
   Slurm has started the owner's job again, or if the heartbeat has not changed for STALE_S seconds.
"""

import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.errors import ConfigError, LostOwnershipError
from fnet_dist.processes import process_start_ticks
from fnet_dist.run.run_dir import PathInside, RunDir, mtime, read_json, write_json
from fnet_dist.run.stop import StopRequested, stop_reason

HEARTBEAT_EVERY_S = 1.0
# Long enough that a loaded machine or a slow file server is not taken for a dead owner. Measured by the watcher's own
# clock since the last change that it saw: the clocks of two machines differ.
STALE_S = 30.0


@dataclass(frozen=True)
class Attempt:
    """A claimed attempt of a run, and its paths; `number` counts from 1."""

    run: RunDir
    number: int

    begin = PathInside("begin.json")
    end = PathInside("end.json")
    heartbeat = PathInside("alive")
    tracking_log = PathInside("wandb.log")  # what the W&B SDK printed in rank 0's tracking process

    @property
    def path(self) -> Path:
        """The attempt's directory."""
        return self.run.attempt(self.number)

    def log(self, rank: int) -> Path:
        """Return the file that takes `rank`'s standard output and error."""
        return self.path / f"rank_{rank}.log"

    def error(self, rank: int) -> Path:
        """Return torchrun's error file of `rank`: why it failed."""
        return self.path / f"rank_{rank}.error"

    @property
    def is_superseded(self) -> bool:
        """True if a later attempt has claimed the run. Numbers have no gaps, so one look is enough."""
        return self.run.attempt(self.number + 1).exists()

    def check(self) -> None:
        """Raise LostOwnershipError if a later attempt owns the run. Call it before each commit."""
        if self.is_superseded:
            raise self.lost_ownership_error()

    def lost_ownership_error(self) -> LostOwnershipError:
        """Return the error to raise when a later attempt owns the run."""
        return LostOwnershipError(
            f"attempt {self.number + 1} has taken {self.run.path} over; attempt {self.number} writes nothing more"
        )


def claim_attempt(
    run: RunDir, asked: Callable[[], str] = lambda: "", committed_step: Callable[[], int] = lambda: 0, **begin: Any
) -> Attempt:
    """Claim the next attempt of `run` and return it; `begin` is added to begin.json.

    Wait up to STALE_S seconds if it is unknown whether the last owner is alive. Raise ConfigError, which names host and
    pid, if it is, and StopRequested if `asked` returns a reason meanwhile.
    """
    # The number follows from the attempt that was waited for. A second look at the directory here would be a race: an
    # attempt claimed in between would be followed, although its owner is alive.
    last = _wait_for_owner(run, asked, begin)
    attempt = Attempt(run, 1 if last is None else last.number + 1)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.attempts.mkdir(exist_ok=True)
    owner = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_started": process_start_ticks(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "time": time.time(),
        "slurm_job_id": None,
        "slurm_restart_count": None,
        "address": None,
        "committed_step": committed_step(),  # read after the wait: the last owner may have saved meanwhile
    }
    with tempfile.TemporaryDirectory(dir=run.attempts, prefix=".claim-", ignore_cleanup_errors=True) as temporary:
        claim = Path(temporary) / "claim"
        claim.mkdir()
        write_json(claim / attempt.begin.name, owner | begin)
        (claim / attempt.heartbeat.name).write_text("0")
        try:
            # rename(2) of a directory is atomic, on NFS too, and fails if the target is not empty: it always holds
            # begin.json. mkdir(2) would be as atomic, but a reader could then find an attempt without its owner.
            claim.rename(attempt.path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ConfigError(owner_message(attempt)) from None
    return attempt


@contextmanager
def heartbeat_thread(attempt: Attempt) -> Iterator[None]:
    """Change the attempt's heartbeat file every second while the block runs, in a thread."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(HEARTBEAT_EVERY_S):
            count += 1
            # A full disk may have room again later. If the directory is gone, the next commit reports that.
            with suppress(OSError):
                # Never create the file: a thread of a removed run must not bring a part of its directory back.
                descriptor = os.open(attempt.heartbeat, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, str(count).encode(), 0)
                finally:
                    # NFS sends the bytes to the server at close (close-to-open consistency): whoever opens the file
                    # afterwards sees them. A descriptor that stays open could keep them in this client's cache.
                    os.close(descriptor)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def list_attempts(run: RunDir) -> list[Attempt]:
    """Return all attempts, in order."""
    numbers = [int(path.name) for path in run.attempts.glob("[0-9]*") if path.name.isdigit()]
    return [Attempt(run, number) for number in sorted(numbers)]


def last_attempt(run: RunDir) -> Attempt | None:
    """Return the attempt with the highest number, or None if there is none."""
    return next(reversed(list_attempts(run)), None)


def count_stalled_attempts(run: RunDir, committed_step: int, *, count_requeues: bool = False) -> int:
    """Count the attempts in a row, up to the last, that ended without a checkpoint after `committed_step`.

    Attempts that stopped on request do not count; with `count_requeues` those do that asked Slurm for a requeue. Nor do
    attempts that Slurm killed before it started their job again.
    """
    count, later = 0, dict[str, Any]()
    for attempt in reversed(list_attempts(run)):
        begin = read_json(attempt.begin)
        if begin is None or begin["committed_step"] < committed_step:
            break
        end = read_json(attempt.end)
        if end is None:
            counts = not _is_requeue(begin, later)
        else:
            reason = stop_reason(end["reason"])
            counts = reason.status != "stopped" or (count_requeues and reason.slurm == "requeue")
        count += counts
        later = begin
    return count


def _wait_for_owner(run: RunDir, asked: Callable[[], str], begin: Mapping[str, Any]) -> Attempt | None:
    """Return the last attempt once it is over, None if there is none. Raise as claim_attempt does."""
    last = last_attempt(run)
    if last is None:
        return None
    owner = read_json(last.begin)
    seen, began = read_heartbeat(last), time.monotonic()
    while not last.end.exists() and not owner_has_exited(owner) and not _is_requeue(owner, begin):
        if reason := asked():
            raise StopRequested(reason)
        if last.is_superseded:
            return _wait_for_owner(run, asked, begin)
        if read_heartbeat(last) != seen:
            raise ConfigError(owner_message(last))
        if time.monotonic() - began > STALE_S:
            break
        time.sleep(HEARTBEAT_EVERY_S / 5)
    return last


def _is_requeue(owner: Mapping[str, Any], begin: Mapping[str, Any]) -> bool:
    """Return True if `begin` is of the same Slurm job as `owner`, after a later restart of that job.

    Slurm starts a job again only after it has killed the job's processes, or has cut their node off.
    """
    job = begin.get("slurm_job_id")
    return (
        job is not None and job == owner["slurm_job_id"] and begin["slurm_restart_count"] > owner["slurm_restart_count"]
    )


def read_heartbeat(attempt: Attempt) -> str | None:
    """Return the content of the heartbeat file; None if it cannot be read."""
    # Read the content, not st_mtime: an NFS client may cache attributes for a minute, but asks the server at each open.
    try:
        return attempt.heartbeat.read_text()
    except OSError:
        return None


def owner_message(attempt: Attempt) -> str:
    """Return the message for a start that finds `attempt` alive."""
    run, owner = attempt.run, read_json(attempt.begin)
    job = f" in Slurm job {owner['slurm_job_id']}" if owner["slurm_job_id"] else ""
    return (
        f"{run.path} is owned by attempt {attempt.number}: pid {owner['pid']} on {owner['host']}{job}, since "
        f"{owner['since']}; wait for it, end it with `python -m jobs stop {run.path}`, or use another --run.name"
    )


def owner_has_exited(owner: dict[str, Any]) -> bool:
    """Return True if the process that wrote begin.json is known to be gone; False if it is on another machine."""
    if (owner["host"], owner["machine"]) != (socket.gethostname(), _machine()):
        return False
    # The kernel reuses process ids: only the id together with its start time names one process.
    return process_start_ticks(owner["pid"]) is None or process_start_ticks(owner["pid"]) != owner["pid_started"]


def is_alive(attempt: Attempt) -> bool:
    """Return True if the attempt's owner, or its launcher between two attempts, seems to be at work: a single look.

    On this machine its process decides, elsewhere the age of the heartbeat file.
    """
    end = read_json(attempt.end)
    if (end is not None and not end["restarts"]) or owner_has_exited(read_json(attempt.begin)):
        return False
    return time.time() - mtime(attempt.heartbeat) < STALE_S


def _machine() -> str:
    """Return an id of this boot and of this namespace of process ids: containers often share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
