"""Rank 0's tracking, as a process: python -m fnet_dist.tracking.worker PARENT

A process and not a thread: importing the SDK alone would hold rank 0's interpreter for a second, each row for half a
millisecond, and what hangs or breaks in it can be killed. It leaves the processor to training, ignores the signals that
rank 0 answers for it, is told on standard input which attempt to follow and how that ended, and prints what rank 0
shows.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fnet_dist.config.help import one_line
from fnet_dist.config.load import read_config
from fnet_dist.errors import describe
from fnet_dist.processes import exit_with_parent
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import later, sync_command
from fnet_dist.run.exit import exit_process
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import SIGNALS, request_stop
from fnet_dist.tracking.mode import LOOK_EVERY_S, TrackingMode, choose_mode, save_mode, tracking_lock
from fnet_dist.tracking.offline_files import mark_sent
from fnet_dist.tracking.wandb_run import close_session, end_sdk, follow, open_session, prepare_sdk

FINISH_S = 8.0  # for the server to take the last rows; rank 0 waits a little longer
LONGEST_PAUSE_S = 60.0


@dataclass
class AttemptEnd:
    """How the attempt ended, once rank 0 has said it: finished, stopped or failed, and for what reason."""

    told: threading.Event = field(default_factory=threading.Event)
    how: str = "failed"
    reason: str = ""

    def listen(self) -> None:
        """Wait for the words, in a thread of its own; rank 0's death is none."""
        how, _, self.reason = sys.stdin.readline().strip().partition(" ")
        self.how = how or "failed"
        self.told.set()


def main(argv: Sequence[str]) -> int:
    """Track until rank 0 says that the attempt has ended; always 0: nothing here is worth an exit code."""
    [parent] = argv
    for signum in (*SIGNALS, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    exit_with_parent()
    if os.getppid() != int(parent):
        return 0
    with suppress(OSError):
        os.nice(10)
    prepare_sdk()
    if not (words := sys.stdin.readline()):  # rank 0 came to no attempt
        return 0
    path, number = json.loads(words)
    attempt = Attempt(RunDir(Path(path)), number)
    sys.argv[1:] = ["--config", str(attempt.run.config)]  # W&B shows it as the run's command
    with attempt.tracking_log.open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    ending = AttemptEnd()
    threading.Thread(target=ending.listen, daemon=True).start()
    track(attempt, ending, _say)
    return 0


def track(attempt: Attempt, ending: AttemptEnd, say: Callable[[str], None]) -> None:
    """Keep a session open until the end, whatever happens to the SDK, its wandb-core or the server."""
    run, opened, pause_s, said = attempt.run, False, 1.0, ""

    def on_open(place: TrackingMode) -> None:
        nonlocal opened, pause_s
        if not opened and place.url:
            say(f"W&B: {place.url}")
        elif not opened:
            why = f" ({place.why})" if place.why else ""
            say(f"W&B: offline{why}; `{sync_command(run)}` sends it")
        opened, pause_s = True, 1.0

    try:
        place = choose_mode(run, read_config(run.config).tracking)
        while True:
            last_chance = ending.told.is_set()
            try:
                _track_once(attempt, place, ending, on_open)
                return
            except TimeoutError:
                say(f"WARNING: W&B has not taken the last rows within {FINISH_S:g} s; {later(run)}")
                return
            except Exception as error:  # whatever the SDK raises
                end_sdk()
                if attempt.is_superseded:
                    return
                if place.falls_back:
                    place = save_mode(run, replace(place, mode="offline", why=one_line(str(error))))
                    continue
                if (text := one_line(str(error) or type(error).__name__).rstrip(".")) != said:
                    say(f"WARNING: W&B: {text}; {later(run)}")
                    said = text
            # One more try for rows that were on their way; what was never reached is left to a sync.
            if last_chance or (ending.told.wait(pause_s) and not opened):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    except OSError as error:
        say(f"WARNING: W&B: {describe(error)}; {later(run)}")


def _track_once(
    attempt: Attempt, place: TrackingMode, ending: AttemptEnd, on_open: Callable[[TrackingMode], None]
) -> None:
    """One session, from its opening to the attempt's end."""
    run = attempt.run
    with tracking_lock(run, ending.told.is_set) if place.mode == "online" else nullcontext(True) as mine:
        if not mine:
            return
        session = open_session(
            run, run.path, place.mode, FINISH_S, os.getppid(), lambda: request_stop(run, "wandb_stop")
        )
        place = save_mode(run, replace(place, url=(session.wandb_run.url or "") if place.mode == "online" else ""))
        on_open(place)
        if place.synced:
            mark_sent(run)
        followed = follow(
            run,
            session,
            place.log_every_steps,
            ending.told.is_set,
            lambda: ending.told.wait(LOOK_EVERY_S),
            lambda: not attempt.is_superseded,
        )
        if not attempt.is_superseded:
            close_session(run, session, followed, ending.how, ending.reason)


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
