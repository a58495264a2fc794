"""Rank 0's side of tracking: start the worker process, tell it which attempt to follow, and how that attempt ended."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fnet_dist.config.schema import TrackingConfig
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import sync_hint
from fnet_dist.run.log import LOGGER, write
from fnet_dist.run.outcome import classify_error

END_S = 14.0  # for the worker to send the last rows; then it is killed, and `sync` can send them later
FAILED_S = 2.0  # after an error: the launcher is about to kill this rank (GRACE_S in jobs/launcher/workers.py)

Tracker = subprocess.Popen[str]


@contextmanager
def start_tracker(tracking: TrackingConfig, is_rank0: bool) -> Iterator[Tracker | None]:
    """Run the worker process inside the block, on rank 0 and unless tracking is disabled.

    It starts before its attempt is known, so that importing the SDK (a second of CPU time) overlaps with loading data.
    """
    worker = None
    if tracking.wandb != "disabled" and is_rank0:
        command = [sys.executable, "-m", "fnet_dist.tracking.worker", str(os.getpid())]
        try:
            # A process group of its own: Ctrl-C in the terminal must not reach it before rank 0 has saved.
            encoding = sys.stdout.encoding  # the worker's standard output has it too
            pipe = subprocess.PIPE
            worker = Tracker(command, stdin=pipe, stdout=pipe, encoding=encoding, errors="replace", process_group=0)
        except OSError as error:
            LOGGER.warning(f"W&B: not tracked: {error}")
    try:
        yield worker
    finally:
        if worker is not None:
            worker.kill()  # it has ended already, unless no attempt began
            worker.wait()


@contextmanager
def tracking_attempt(tracker: Tracker | None, attempt: Attempt) -> Iterator[None]:
    """Let W&B follow the metrics log of `attempt` inside the block.

    Training waits for the worker only at the end of the block, END_S at most, and never fails because of it.
    """
    if tracker is None:
        yield
        return
    _send(tracker, json.dumps([str(attempt.run.path), attempt.number]))
    relay = threading.Thread(target=_relay, args=(tracker,), name="tracking", daemon=True)
    relay.start()
    status, reason = "finished", "finished"
    try:
        yield
    except BaseException as error:
        status, reason, _ = classify_error(error)
        raise
    finally:
        _send(tracker, f"{status} {reason}")
        try:
            tracker.wait(FAILED_S if status == "failed" else END_S)
            relay.join(1)  # the worker's last lines come before the final table
            if tracker.returncode != 0:
                where = f"see {attempt.tracking_log}" if attempt.tracking_log.exists() else "its error is above"
                LOGGER.warning(
                    f"W&B: the tracking process has failed with exit code {tracker.returncode} ({where}); "
                    f"{sync_hint(attempt.run)}"
                )
        except subprocess.TimeoutExpired:
            tracker.kill()
            if status != "failed":
                LOGGER.warning(f"W&B has not taken the last rows within {END_S:g} s; {sync_hint(attempt.run)}")


def _send(tracker: Tracker, line: str) -> None:
    assert tracker.stdin is not None
    with suppress(OSError):  # the worker has ended: training goes on without it
        tracker.stdin.write(line + "\n")
        tracker.stdin.flush()


def _relay(tracker: Tracker) -> None:
    """Print each line of the worker's log, until it ends."""
    assert tracker.stdout is not None
    with tracker.stdout:
        for line in tracker.stdout:
            write(line, sys.stdout)
