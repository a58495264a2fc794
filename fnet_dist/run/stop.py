"""Asking a run to stop: whoever asks only sets a flag, the ranks agree on it in the collective they already have."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from fnet_dist.errors import FnetError
from fnet_dist.run.run_dir import RunDir, write_atomically

# A reason travels between ranks as its place in this tuple, 0 being none; of several the last counts.
REASONS = (
    "",
    "signal_usr1",
    "signal_usr2",
    "signal_term",
    "signal_int",
    "deadline",
    "stop_file",
    "wandb_stop",
    "lost_ownership",
)
AGREED_STOPS = frozenset(REASONS) - {"", "lost_ownership"}
GOES_ON = frozenset({"signal_usr2", "deadline", "signal_term"})  # after these Slurm may start a run again
_SIGNALS = {
    signal.SIGUSR1: "signal_usr1",
    signal.SIGUSR2: "signal_usr2",
    signal.SIGTERM: "signal_term",
    signal.SIGINT: "signal_int",
}
SIGNALS = tuple(_SIGNALS)


class StopRequested(Exception):  # noqa: N818  # a wish, no error
    """All ranks have agreed to leave here, for `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoppedError(FnetError):
    """The run has stopped because somebody asked, its state is saved: 75, or 130 after Ctrl-C."""

    def __init__(self, step: int, reason: str, run: RunDir) -> None:
        where = f"at step {step:,} as asked ({reason}), checkpointed" if step else f"before step 1 as asked ({reason})"
        super().__init__(f"stopped {where}")
        self.run = run
        self.reason = reason
        self.exit_code = 130 if reason == "signal_int" else 75


class StopFlag:
    """Why this rank was asked to stop, or "" while it was not.

    `deadline` is Unix time in seconds; `stop_file` is looked for by the rank that knows it.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.reason = ""
        self.deadline = deadline
        self.stop_file: Path | None = None
        self._interrupted = False

    def set(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.reason = _SIGNALS[signal.Signals(number)]

    def look(self) -> str:
        """The reason, after a look at the clock and for a STOP file: once a window, never once a step."""
        if not self.reason:
            if self.deadline is not None and time.time() >= self.deadline:
                self.reason = "deadline"
            elif self.stop_file is not None and self.stop_file.exists():
                self.reason = "stop_file"
                with suppress(OSError):  # a directory, or taken away again: it was there
                    if self.stop_file.read_bytes() == b"wandb_stop":
                        self.reason = "wandb_stop"
        return self.reason


def request_stop(run: RunDir, reason: str) -> None:
    """Ask the run's owner for a checkpoint and an end, by the STOP file; `reason` says who asks."""
    write_atomically(run.stop, reason.encode())


def install_handlers(deadline: float | None = None) -> StopFlag:
    """From here on SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set the flag that is returned."""
    flag = StopFlag(deadline)
    for number in SIGNALS:
        signal.signal(number, flag.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `jobs run` blocks them until there are handlers
    return flag
