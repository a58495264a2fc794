"""The tracking worker, a process beside rank 0: python -m fnet_dist.tracking.worker PARENT_PID

A process and not a thread: importing the SDK would hold rank 0's interpreter lock for a second, each row for half a
millisecond, and a process that hangs can be killed. Rank 0 writes two lines to its standard input: run directory and
number of the attempt as JSON, then "STATUS REASON" when the attempt has ended. Rank 0 prints what this process prints.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from fnet_dist.config.load import read_section
from fnet_dist.errors import describe
from fnet_dist.processes import exit_with_parent
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import command_for, sync_hint
from fnet_dist.run.exit import exit_process
from fnet_dist.run.log import LOGGER, configure_logging
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.sharing import share_files
from fnet_dist.run.stop import SIGNALS, request_stop
from fnet_dist.tracking.mode import (
    POLL_S,
    TrackingMode,
    choose_mode,
    describe_sdk_error,
    read_mode,
    save_mode,
    tracking_lock,
)
from fnet_dist.tracking.offline_files import mark_sent
from fnet_dist.tracking.wandb_run import Session, close_session, end_sdk, follow, open_session, prepare_sdk

FINISH_S = 8.0  # for the server to take the last rows; END_S of client.py must be longer
MAX_PAUSE_S = 60.0  # a server's outage may last hours: retry, but do not load it


@dataclass
class AttemptEnd:
    """Status and reason of the attempt's end, once rank 0 has sent them; "failed" if rank 0 died."""

    known: threading.Event = field(default_factory=threading.Event)
    status: str = "failed"
    reason: str = ""

    def read(self) -> None:
        """Wait for rank 0's second line, in a thread."""
        status, _, self.reason = sys.stdin.readline().strip().partition(" ")
        self.status = status or "failed"
        self.known.set()


def main(argv: Sequence[str]) -> int:
    """Track until rank 0 says that the attempt has ended; always return 0: tracking never fails training."""
    [parent] = argv
    # Slurm and terminals signal every process; rank 0 answers, and this process follows it to the last row.
    for signum in (*SIGNALS, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    exit_with_parent()
    if os.getppid() != int(parent):  # rank 0 died before the line above
        return 0
    with suppress(OSError):
        os.nice(10)  # training has the CPU first
    prepare_sdk()
    if not (line := sys.stdin.readline()):  # rank 0 ended before an attempt began
        return 0
    path, number = json.loads(line)
    attempt = Attempt(RunDir(Path(path)), number)
    configure_logging("tracking", number)
    share_files(attempt.run.path)
    sys.argv[1:] = ["--config", str(attempt.run.config)]  # W&B shows it as the run's command
    with attempt.tracking_log.open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    end = AttemptEnd()
    threading.Thread(target=end.read, daemon=True).start()
    track(attempt, end)
    return 0


def track(attempt: Attempt, end: AttemptEnd) -> None:
    """Keep a W&B session open until the attempt ends; open it again after an error of the SDK, wandb-core or server."""
    run, was_open, pause_s = attempt.run, False, 1.0
    log_once = cache(LOGGER.log)  # retries would repeat the same line for hours
    try:
        mode = choose_mode(run, read_section(run.config, "tracking"))
        while True:
            is_last_try = end.known.is_set()
            try:
                with tracking_lock(run, end.known.is_set) if mode.mode == "online" else nullcontext(True) as locked:
                    if not locked:
                        return
                    session, mode = _open(attempt, mode, log_once)
                    was_open, pause_s, every_steps = True, 1.0, mode.log_every_steps
                    rows, _ = follow(
                        run, session, every_steps, lambda: end.known.wait(POLL_S), lambda: not attempt.is_superseded
                    )
                    if not attempt.is_superseded:  # else the later attempt sends the rest and closes the run
                        try:
                            close_session(session, rows, end.status, end.reason)
                        except TimeoutError:
                            LOGGER.warning(f"W&B has not taken the last rows within {FINISH_S:g} s; {sync_hint(run)}")
                return
            except Exception as error:  # the SDK raises many types
                end_sdk()
                if attempt.is_superseded:
                    return
                text = describe_sdk_error(error)
                if read_mode(run) is None:  # `auto` found a server, which did not accept us: fall back
                    mode = save_mode(run, replace(mode, mode="offline", why=text))
                    continue
                log_once(logging.WARNING, f"W&B: {text}; {sync_hint(run)}")
            # At the end, try once more only if there was a session: a server that was never reached is left to `sync`.
            if is_last_try or (end.known.wait(pause_s) and not was_open):
                return
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
    except OSError as error:
        LOGGER.warning(f"W&B: {describe(error)}; {sync_hint(run)}")


def _open(attempt: Attempt, mode: TrackingMode, log_once: Callable[[int, str], None]) -> tuple[Session, TrackingMode]:
    """Open a session and fix the run's mode; log where the run is shown."""
    run = attempt.run
    session = open_session(run, run.path, mode.mode, FINISH_S, os.getppid(), lambda: request_stop(run, "wandb_stop"))
    mode = save_mode(run, replace(mode, url=(session.wandb_run.url or "") if mode.mode == "online" else ""))
    why = f" ({mode.why})" if mode.why else ""
    where = mode.url or f"offline{why}; `{command_for(run, 'sync')}` sends it"
    log_once(logging.INFO, f"W&B: {where}")
    if mode.synced:
        mark_sent(run)
    return session, mode


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
