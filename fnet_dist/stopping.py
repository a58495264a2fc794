"""Asking a run to stop: handlers only set a flag, the ranks agree on it in the window's collective."""

import signal
from types import FrameType

from fnet_dist.errors import FnetError

# A reason travels between ranks as its place in this tuple, 0 being none.
REASONS = ("", "signal_usr1", "signal_usr2", "signal_term", "signal_int")
_SIGNALS = {
    signal.SIGUSR1: "signal_usr1",
    signal.SIGUSR2: "signal_usr2",
    signal.SIGTERM: "signal_term",
    signal.SIGINT: "signal_int",
}


class StoppedError(FnetError):
    """The run ends because somebody asked: 130 after Ctrl-C, else 1, since nothing can be resumed yet."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"stopped after step {step} ({reason}); what was trained is on record, but resuming does not exist yet"
        )
        self.reason = reason
        self.exit_code = 130 if reason == "signal_int" else 1


class StopFlag:
    """Why this rank was asked to stop, or "" while it was not."""

    reason = ""
    _interrupted = False

    def set(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.reason = _SIGNALS[signal.Signals(number)]


def install_handlers() -> StopFlag:
    """From here on SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set the flag that is returned."""
    flag = StopFlag()
    for number in _SIGNALS:
        signal.signal(number, flag.set)
    return flag
