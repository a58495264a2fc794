"""Rank 0's side of tracking: it starts the process that follows the ledger into W&B, and says how the attempt ended."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fnet_dist.attempt import Attempt, explain
from fnet_dist.config import TrackingConfig
from fnet_dist.console import later

END_S = 14.0  # for the end of tracking; then it is killed, and a sync can make up for it
# A rank that failed is about to be ended by its launcher.
FAILED_S = 2.0


@contextmanager
def tracked(tracking: TrackingConfig, attempt: Attempt, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, W&B follows the ledger of `attempt`, unless tracking is disabled. `say` prints a line.

    Training never waits for it but at the end, bounded, and never fails because of it.
    """
    if tracking.wandb == "disabled":
        yield
        return
    started = _start(attempt, say)
    how, reason = "failed", ""
    try:
        yield
        how, reason = "finished", "finished"
    except BaseException as error:
        how, reason, _ = explain(error)
        raise
    finally:
        if started is not None and not _end(started, how, reason):
            say(f"WARNING: W&B has not taken the last rows within {END_S:g} s; {later(attempt.run)}")


@dataclass(frozen=True)
class _Started:
    """The tracking process, and the thread that shows what it prints."""

    process: subprocess.Popen[str]
    relay: threading.Thread


def _start(attempt: Attempt, say: Callable[[str], None]) -> _Started | None:
    command = [sys.executable, "-m", "fnet_dist.tracking_process"]
    try:
        with attempt.tracking_log.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(attempt.run.path), str(attempt.number), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
            )
    except OSError as error:
        say(f"WARNING: W&B: not tracked: {error}")
        return None

    def relay() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                say(line.rstrip("\n"))

    thread = threading.Thread(target=relay, name="tracking", daemon=True)
    thread.start()
    return _Started(process, thread)


def _end(started: _Started, how: str, reason: str) -> bool:
    """Tell it how the attempt ended and why, and wait for it; False if it had to be killed, though there was time."""
    process = started.process
    with suppress(OSError):
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(f"{how} {reason}\n")
    try:
        process.wait(FAILED_S if how == "failed" else END_S)
        started.relay.join(1)  # its last words come before the table
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return how == "failed"
    return True
