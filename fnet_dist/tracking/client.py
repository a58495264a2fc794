"""Rank 0's side of tracking: it starts the process that follows the ledger into W&B, and says how the attempt ended."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fnet_dist.config.schema import TrackingConfig
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import later
from fnet_dist.run.outcome import classify_error

END_S = 14.0  # for the end of tracking; then it is killed, and a sync can make up for it
# A rank that failed is about to be ended by its launcher.
FAILED_S = 2.0


@dataclass(frozen=True)
class Tracker:
    """The tracking process: started early, as importing the SDK takes a second of a core, and told of its run later."""

    process: subprocess.Popen[str] | None
    problem: str = ""


@contextmanager
def start_tracker(tracking: TrackingConfig, is_rank0: bool) -> Iterator[Tracker | None]:
    """Inside there is a tracking process, unless tracking is disabled or this is not rank 0."""
    if tracking.wandb == "disabled" or not is_rank0:
        yield None
        return
    command = [sys.executable, "-m", "fnet_dist.tracking.worker", str(os.getpid())]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    except OSError as error:
        yield Tracker(None, f"WARNING: W&B: not tracked: {error}")
        return
    try:
        yield Tracker(process)
    finally:
        process.kill()  # it has ended, unless the run did not come to its first step
        process.wait()


@contextmanager
def tracking_attempt(tracker: Tracker | None, attempt: Attempt, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, W&B follows the ledger of `attempt`, if there is a tracker. `say` prints a line.

    Training never waits for it but at the end, bounded, and never fails because of it.
    """
    if tracker is None or tracker.process is None:
        if tracker is not None:
            say(tracker.problem)
        yield
        return
    relay = _begin(tracker.process, attempt, say)
    how, reason = "failed", ""
    try:
        yield
        how, reason = "finished", "finished"
    except BaseException as error:
        how, reason, _ = classify_error(error)
        raise
    finally:
        if not _end(tracker.process, relay, how, reason):
            say(f"WARNING: W&B has not taken the last rows within {END_S:g} s; {later(attempt.run)}")


def _begin(process: subprocess.Popen[str], attempt: Attempt, say: Callable[[str], None]) -> threading.Thread:
    """Tell it which attempt to follow; the thread that shows what it prints."""
    assert process.stdin is not None
    with suppress(OSError):  # a process that has ended is as good as one that ends later
        process.stdin.write(json.dumps([str(attempt.run.path), attempt.number]) + "\n")
        process.stdin.flush()

    def relay() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                say(line.rstrip("\n"))

    thread = threading.Thread(target=relay, name="tracking", daemon=True)
    thread.start()
    return thread


def _end(process: subprocess.Popen[str], relay: threading.Thread, how: str, reason: str) -> bool:
    """Tell it how the attempt ended and why, and wait for it; False if it had to be killed, though there was time."""
    with suppress(OSError):
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(f"{how} {reason}\n")
    try:
        process.wait(FAILED_S if how == "failed" else END_S)
        relay.join(1)  # its last words come before the table
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return how == "failed"
    return True
