"""Stop requests, and the one table that says what each stop or end of a run means.

A signal becomes a stop in four steps. The signal handler of `StopFlag` stores a reason. Once per window the training
loop asks `StopFlag.look`, and the ranks exchange their reasons in the collective that closes the window: all ranks see
the same reason at the same step. `StopRequested` then leaves the loop on every rank. Rank 0 saves a checkpoint, and
`StoppedError` ends the process with the exit code of the table.
"""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import FrameType
from typing import Literal

from fnet_dist.errors import ConfigError, DataError, FnetError
from fnet_dist.run.run_dir import RunDir, write_atomically


@dataclass(frozen=True)
class StopReason:
    """A row of STOP_REASONS: what one `reason` of outcome.json and end.json means."""

    name: str
    # `status` of outcome.json. "stopped": all ranks agreed and rank 0 saved. Such an attempt is not restarted, and it
    # does not count as an attempt without progress.
    status: Literal["finished", "stopped", "failed"]
    exit_code: int
    # The signal that requests this stop.
    signal: Signals | None = None
    # What node 0 of a Slurm job does next. "end": let the job end. "requeue": ask Slurm to queue the job again, at most
    # resources.max_requeues times, and only while attempts save new checkpoints. "wait": Slurm alone decides whether
    # the job starts again. After "requeue" and "wait" a STOP file is kept for the next start of the job.
    slurm: Literal["end", "requeue", "wait"] = "end"
    # True if the same steps would fail in the same way: the launcher starts no further attempt.
    final: bool = False


# Between ranks a reason travels as its position in this tuple, counted from 1; 0 is "no reason". If several ranks have
# different reasons, the last row counts: a lost run must not be saved, whatever else was requested.
STOP_REASONS = (
    StopReason("signal_usr1", "stopped", 75, signal.SIGUSR1),
    StopReason("signal_usr2", "stopped", 75, signal.SIGUSR2, slurm="requeue"),  # sbatch --signal, before the time limit
    StopReason("signal_term", "stopped", 75, signal.SIGTERM, slurm="wait"),  # preemption, scancel, scontrol requeue
    StopReason("signal_int", "stopped", 130, signal.SIGINT),  # 128 + SIGINT, as a shell reports Ctrl-C
    StopReason("deadline", "stopped", 75, slurm="requeue"),
    StopReason("stop_file", "stopped", 75),
    StopReason("wandb_stop", "stopped", 75),
    StopReason("lost_ownership", "failed", 75),
    # The rows below never travel between ranks. Those of the classes in errors.py have the same exit code there.
    StopReason("finished", "finished", 0),
    StopReason("patience", "finished", 0),  # no better evaluation for run.patience of them
    StopReason("non_finite", "failed", 1),  # tried again with parallel.replay_on_failure
    StopReason("data", "failed", 65, final=True),
    StopReason("checkpoint", "failed", 65, final=True),
    StopReason("desync", "failed", 1),
    StopReason("io", "failed", 74),
    StopReason("hang", "failed", 1),
    StopReason("bad_node", "failed", 75, slurm="requeue"),  # the attempt's own reason is in its `failure`
    StopReason("no_progress", "failed", 1),
    StopReason("crash", "failed", 1),  # any other exception, or a rank that was killed
)

_BY_NAME = {row.name: row for row in STOP_REASONS}
SIGNALS = tuple(row.signal for row in STOP_REASONS if row.signal is not None)
# Exit codes of ranks that stopped on request. A rank that lost the run has one of them too: a restart would not help.
STOPPED_EXIT_CODES = frozenset(row.exit_code for row in STOP_REASONS if row.status == "stopped")


def stop_reason(name: str) -> StopReason:
    """Return the row of `name`; an unknown one, as another version may have written, counts as a crash."""
    return _BY_NAME.get(name, _BY_NAME["crash"])


def reason_of_signal(number: int) -> StopReason:
    """Return the row of a signal in SIGNALS."""
    return next(row for row in STOP_REASONS if row.signal == number)


def encode_reason(name: str) -> int:
    """Return the number that a collective carries for the reason `name`; 0 for ""."""
    return STOP_REASONS.index(_BY_NAME[name]) + 1 if name else 0


def decode_reason(number: int) -> str:
    """Return the reason that `encode_reason` made `number` of."""
    return STOP_REASONS[number - 1].name if number else ""


def is_final(reason: str, exit_code: int) -> bool:
    """Return True if a restart after this failure would fail in the same way."""
    # The exit code decides for a ConfigError, whose reason is "crash", and for a rank that wrote no error file.
    return stop_reason(reason).final or exit_code in (ConfigError.exit_code, DataError.exit_code)


class StopRequested(Exception):  # noqa: N818  # not an error: it leaves the training loop
    """All ranks have agreed to stop at this step because of `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoppedError(FnetError):
    """The run has stopped on request, and its state is saved."""

    def __init__(self, step: int, reason: str, run: RunDir) -> None:
        where, saved = (f"at step {step:,}", ", checkpointed") if step else ("before step 1", "")
        super().__init__(f"stopped {where} as asked ({reason}){saved}")
        self.run, self.reason, self.exit_code = run, reason, stop_reason(reason).exit_code


class StopFlag:
    """The reason why this rank was asked to stop; "" as long as it was not."""

    def __init__(self, deadline: float | None = None, *, has_launcher: bool = False) -> None:
        self.reason = ""
        self.deadline = deadline  # Unix time in seconds
        self.stop_file: Path | None = None  # set on rank 0 alone: one rank asking a shared disk is enough
        self._interrupted = False  # by Ctrl-C; another one ends at once
        # A launcher kills its ranks at a second Ctrl-C. Here it may be the first, from the launcher and from Slurm.
        self._has_launcher = has_launcher

    def set(self, number: int, frame: FrameType | None) -> None:
        """Store the reason of signal `number`: the signal handler. A second Ctrl-C raises KeyboardInterrupt."""
        if number == signal.SIGINT and self._interrupted and not self._has_launcher:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.reason = reason_of_signal(number).name

    def look(self) -> str:
        """Return the reason, after a look at the clock and for the STOP file."""
        if not self.reason:  # asked once per window, not once per step: on NFS each look is a request to the server
            if self.deadline is not None and time.time() >= self.deadline:
                self.reason = "deadline"
            elif self.stop_file is not None and self.stop_file.exists():
                self.reason = "stop_file"
                with suppress(OSError):  # it may be a directory, or be gone again: it still requested a stop
                    if self.stop_file.read_bytes() == b"wandb_stop":
                        self.reason = "wandb_stop"
        return self.reason


def request_stop(run: RunDir, reason: str) -> None:
    """Ask the processes of `run` to save and stop, through a STOP file that holds `reason`."""
    write_atomically(run.stop, reason.encode())


Handler = Callable[[int, FrameType | None], None]


def stop_handlers(handler: Handler) -> dict[int, Handler]:
    """Return the handler of each signal that asks for a stop: `handler`, for SIGHUP too, which then is a SIGTERM.

    A terminal that closes sends SIGHUP. nohup ignores it, and then it stays ignored.
    """
    handlers: dict[int, Handler] = dict.fromkeys(SIGNALS, handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        handlers[signal.SIGHUP] = lambda number, frame: handler(signal.SIGTERM, frame)
    return handlers


def install_handlers(deadline: float | None = None, *, has_launcher: bool = False) -> StopFlag:
    """Let SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 set the returned flag from now on."""
    flag = StopFlag(deadline, has_launcher=has_launcher)
    for number, handler in stop_handlers(flag.set).items():
        signal.signal(number, handler)
    # `fnet run` starts ranks with these signals blocked. One that arrived since then is pending, and delivered now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return flag
