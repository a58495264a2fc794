"""Attempts: who owns a run, and who may start it.

An attempt is one process group's work on a run. Its number is a fencing token: an owner that finds a higher number no
longer owns the run and writes nothing more. README.md ("Restarts and owners") has the protocol: claim by a rename,
change a heartbeat file, look for a higher number before each commit, end, take over.
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
from itertools import count
from pathlib import Path
from typing import Any

from fnet_dist.errors import ConfigError, LostOwnershipError
from fnet_dist.processes import is_others, process_start_ticks, quoted
from fnet_dist.run import metrics_log
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import PathInside, RunDir, mtime, read_json, write_config, write_json
from fnet_dist.run.sharing import Mode, make_run_dir, share_files
from fnet_dist.run.stop import StopRequested, stop_reason

HEARTBEAT_EVERY_S = 1.0
# Long enough that a loaded machine or a slow file server is not taken for a dead owner. Measured by the watcher's own
# clock since the last change that it saw: the clocks of two machines differ.
STALE_S = 30.0


# Of an attempt whose begin.json somebody removed. It saved nothing that is known: the count of attempts ends there.
_UNKNOWN_OWNER: Mapping[str, Any] = {
    "host": "?",
    "machine": None,
    "pid": "?",
    "pid_started": None,
    "since": "?",
    "time": None,
    "launch_id": None,
    "slurm_job_id": None,
    "slurm_restart_count": None,
    "address": None,
    "world_size": None,
    "committed_step": -1,
    "settings": None,
}


@dataclass(frozen=True)
class Attempt:
    """A claimed attempt of a run, and its paths; `number` counts from 1."""

    run: RunDir
    number: int

    begin = PathInside("begin.json")  # the owner, and what it started
    end = PathInside("end.json")  # how it ended; gives the run up
    heartbeat = PathInside("alive")  # changed every HEARTBEAT_EVERY_S seconds

    @property
    def path(self) -> Path:
        """The attempt's directory."""
        return self.run.attempt(self.number)

    @property
    def logs(self) -> Path:
        """The directory of what its processes print."""
        return self.run.logs / self.path.name

    @property
    def tracking_log(self) -> Path:
        """The file that takes what the W&B SDK prints in rank 0's tracking process."""
        return self.logs / "wandb.log"

    def log(self, rank: int) -> Path:
        """Return the file that takes `rank`'s standard output and error."""
        before_logs = self.path / f"rank_{rank}.log"  # versions before 2026-12 wrote it there
        return before_logs if before_logs.exists() else self.logs / before_logs.name

    def error(self, rank: int) -> Path:
        """Return torchrun's error file of `rank`: why it failed."""
        return self.path / f"rank_{rank}.error"

    def collectives(self, rank: int) -> Path:
        """Return the file that takes the last collectives of `rank`, if it hangs."""
        return self.path / f"rank_{rank}.collectives.json"

    def read_begin(self) -> dict[str, Any]:
        """Return begin.json; if it is missing or damaged, an owner on no known machine and in no job."""
        return {**_UNKNOWN_OWNER, **(read_json(self.begin) or {})}

    def read_end(self) -> dict[str, Any] | None:
        """Return end.json; None if there is none, as after a kill, or if it is damaged."""
        end: dict[str, Any] | None = read_json(self.end)
        return end

    @property
    def is_superseded(self) -> bool:
        """True if a later attempt has claimed the run."""
        return max(_numbers(self.run), default=0) > self.number

    def check(self) -> None:
        """Raise LostOwnershipError if a later attempt owns the run. Call it before each commit."""
        if self.is_superseded:  # a suspended owner, for instance, that continues after another start took over
            raise self.lost_ownership_error()

    def lost_ownership_error(self) -> LostOwnershipError:
        """Return the error to raise when a later attempt owns the run."""
        return LostOwnershipError(
            f"attempt {self.number + 1} has taken {self.run.path} over; attempt {self.number} writes nothing more"
        )


def claim_attempt(
    run: RunDir,
    asked: Callable[[], str] = lambda: "",
    committed_step: Callable[[], int] = lambda: 0,
    mode: Mode = "private",
    **begin: Any,
) -> Attempt:
    """Claim the next attempt of `run` and return it; `begin` is added to begin.json, `mode` is that of a new directory.

    Wait up to STALE_S seconds if it is unknown whether the last owner is alive. Raise ConfigError, which names host and
    pid, if it is, and StopRequested if `asked` returns a reason meanwhile. `committed_step` is called after the wait,
    before anything is written; it may raise.
    """
    # Attempts may have been removed: with a number below the metrics log's, the new lines would be skipped. Read before
    # the wait: an attempt that is claimed meanwhile must not be followed.
    logged = max((line["attempt"] for line in metrics_log.tail(run.metrics_log, bool)), default=0)
    last = _wait_for_owner(run, asked, begin)
    step = committed_step()  # after the wait: the last owner may have saved meanwhile
    # The number follows from the attempt that was waited for. A second look at the directory here would be a race: an
    # attempt claimed in between would be followed, although its owner is alive.
    attempt = Attempt(run, max(logged, 0 if last is None else last.number) + 1)
    make_run_dir(run.path, mode)
    run.attempts.mkdir(exist_ok=True)
    attempt.logs.mkdir(parents=True, exist_ok=True)  # before the attempt: other nodes open their logs once they see it
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
        "committed_step": step,
    }
    with tempfile.TemporaryDirectory(dir=run.attempts, prefix=".claim-", ignore_cleanup_errors=True) as temporary:
        claim = Path(temporary) / attempt.path.name  # the temporary directory itself has mode 0700
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
    ended, begin = threading.Event(), read_json(attempt.begin)

    def beat() -> None:
        missed = 0
        for beats in count(1):
            if ended.wait(HEARTBEAT_EVERY_S):
                return
            # A full disk may have room again later. "r+" never creates the file: a thread of a removed run must not
            # bring a part of its directory back. Closed each time: NFS sends the bytes to the server at close, and the
            # next open sees them (close-to-open).
            try:
                with attempt.heartbeat.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), str(beats).encode(), 0)
                missed = 0
            except FileNotFoundError:
                missed += 1
            except OSError:
                continue
            # Somebody removes old attempts: this one must stay visible, as its owner. Not at the first look: the whole
            # run may be about to go.
            if missed > 1 and attempt.run.path.exists():
                with suppress(OSError):
                    attempt.path.mkdir(parents=True, exist_ok=True)
                    write_json(attempt.begin, begin)
                    attempt.heartbeat.write_text(str(beats), encoding="ascii")

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def list_attempts(run: RunDir) -> list[Attempt]:
    """Return all attempts, in order."""
    return [Attempt(run, number) for number in sorted(_numbers(run))]


def begun_settings(run: RunDir) -> dict[str, Any] | None:
    """Return the settings that the newest attempt began with, in the form of config.json; None if none is known."""
    found = (attempt.read_begin()["settings"] for attempt in reversed(list_attempts(run)))
    return next((settings for settings in found if settings is not None), None)


def restore_config(run: RunDir) -> None:
    """Write a damaged config.json anew, and say so, if an attempt knows what was in it."""
    if _is_damaged(run.config) and (settings := begun_settings(run)) is not None:
        share_files(run.path)
        write_config(run, settings)
        LOGGER.warning(f"{run.config} was empty or damaged; written anew from the last attempt's settings")


def damage_note(run: RunDir) -> str:
    """Return a line that names the small files of `run` that are empty or damaged; "" if none is."""
    last = last_attempt(run)
    files = [run.config, run.manifest, run.outcome, *([] if last is None else [last.begin, last.end])]
    names = ", ".join(str(path.relative_to(run.path)) for path in files if _is_damaged(path))
    return names and f"empty or damaged: {names}; checkpoints and metrics are not concerned, and a start goes on"


def _is_damaged(path: Path) -> bool:
    return path.exists() and read_json(path) is None


def last_attempt(run: RunDir) -> Attempt | None:
    """Return the attempt with the highest number, or None if there is none."""
    return next(reversed(list_attempts(run)), None)


def _numbers(run: RunDir) -> list[int]:
    try:
        return [int(path.name) for path in run.attempts.iterdir() if path.name.isdigit()]
    except FileNotFoundError:
        return []


def count_stalled_attempts(run: RunDir, committed_step: int, *, count_requeues: bool = False) -> int:
    """Count the attempts in a row, up to the last, that ended without a checkpoint after `committed_step`.

    Attempts that stopped on request do not count; with `count_requeues` those do that asked Slurm for a requeue, unless
    it was a preemption. Nor do attempts that Slurm killed before it started their job again.
    """
    stalled, later = 0, dict[str, Any]()
    for attempt in reversed(list_attempts(run)):
        begin = attempt.read_begin()
        if begin["committed_step"] < committed_step:  # a checkpoint was saved since: the row ends
            break
        if (end := attempt.read_end()) is None:
            stalled += not _is_requeue(begin, later)
        else:
            reason = stop_reason(end["reason"])
            asked = count_requeues and reason.slurm == "requeue" and not end.get("preempted")
            stalled += reason.status != "stopped" or asked
        later = begin
    return stalled


def _wait_for_owner(run: RunDir, asked: Callable[[], str], begin: Mapping[str, Any]) -> Attempt | None:
    """Return the last attempt once it is over, None if there is none. Raise as claim_attempt does."""
    last = last_attempt(run)
    if last is None:
        return None
    seen, began = read_heartbeat(last), time.monotonic()
    while not last.end.exists() and not owner_has_exited(last) and not _is_requeue(last.read_begin(), begin):
        if reason := asked():
            raise StopRequested(reason)
        if last.is_superseded:  # another start was quicker: wait for that one
            return _wait_for_owner(run, asked, begin)
        if read_heartbeat(last) != seen:
            raise ConfigError(owner_message(last))
        if time.monotonic() - began > STALE_S:
            break
        time.sleep(HEARTBEAT_EVERY_S / 5)  # a live owner is noticed soon after its next heartbeat
    return last


def _is_requeue(owner: Mapping[str, Any], begin: Mapping[str, Any]) -> bool:
    """Return True if `begin` is of a later restart of the Slurm job of `owner`."""
    # Slurm starts a job again only after it has killed the job's processes, or has cut their node off.
    job = begin.get("slurm_job_id")
    if job is None or job != owner["slurm_job_id"]:
        return False
    return bool(begin["slurm_restart_count"] > owner["slurm_restart_count"])


def read_heartbeat(attempt: Attempt) -> str | None:
    with suppress(OSError):  # the content, not st_mtime: an NFS client may cache attributes for a minute
        return attempt.heartbeat.read_text()
    return None


def owner_message(attempt: Attempt) -> str:
    """Return the message for a start that finds `attempt` alive."""
    run, owner = attempt.run, attempt.read_begin()
    job = f" in Slurm job {owner['slurm_job_id']}" if owner["slurm_job_id"] else ""
    return (
        f"{run.path} is owned by attempt {attempt.number}: pid {owner['pid']} on {owner['host']}{job}, since "
        f"{owner['since']}; wait for it, end it with `fnet stop {quoted(run.path)}`, or use another --run.name"
    )


def owner_has_exited(attempt: Attempt) -> bool:
    """Return True if the process that wrote begin.json is known to be gone; False if it is on another machine."""
    owner = attempt.read_begin()
    if owner["machine"] is None:  # a live owner whose files are removed writes them again
        return not attempt.heartbeat.exists()
    if (owner["host"], owner["machine"]) != (socket.gethostname(), _machine()):
        return False
    if (started := process_start_ticks(owner["pid"])) is None:  # gone; or /proc hides another user's process
        return not is_others(owner["pid"])
    return bool(started != owner["pid_started"])  # the kernel reuses process ids: the start time is part of the name


def is_alive(attempt: Attempt) -> bool:
    """Return True if the attempt's owner, or its launcher between two attempts, seems to be at work: a single look."""
    end = attempt.read_end()
    if (end is not None and not end["restarts"]) or owner_has_exited(attempt):
        return False
    return time.time() - mtime(attempt.heartbeat) < STALE_S  # its process may be on a machine that we cannot ask


def _machine() -> str:
    """Return an id of this boot and of this namespace of process ids: containers often share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
