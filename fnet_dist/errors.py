"""The errors that end a run, with their exit code and `reason` in outcome.json (see fnet_dist/run/stop.py).

Exit codes above 2 are those of sysexits.h: EX_DATAERR 65, EX_IOERR 74, EX_TEMPFAIL 75.
"""

from collections.abc import Sequence


class FnetError(Exception):
    """An error that one line explains: what was found, what was expected, what to do. No traceback is shown."""

    exit_code = 1
    reason = "crash"


class ConfigError(FnetError):
    """A bad setting or command line, or a start that is refused; nothing was written."""

    exit_code = 2


class DataError(FnetError):
    """The data set is missing or corrupt; a restart would not help."""

    exit_code = 65
    reason = "data"


class SampleError(DataError):
    """A sample could not be read; unlike most errors, only the rank that reads it raises it."""


class CheckpointError(FnetError):
    """All checkpoints of a run are corrupt; a restart would not help, and training from scratch would hide it."""

    exit_code = 65
    reason = "checkpoint"


class SharedError(FnetError):
    """An error that all ranks raise; `rank` is the one that caused it, None if that is not known or several did."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class NonFiniteError(SharedError):
    """A loss, gradient or weight is infinite or NaN; `samples` are the indices in the global batch of the `step`."""

    reason = "non_finite"

    def __init__(
        self, message: str, rank: int | None = None, step: int | None = None, samples: Sequence[int] = ()
    ) -> None:
        super().__init__(message, rank)
        self.samples = samples
        if step is not None:
            note_step(self, step - 1)


class DesyncError(SharedError):
    """The ranks have different weights: one of them computed or stored a wrong value, as faulty memory does."""

    reason = "desync"


class StorageError(FnetError):
    """The run directory could not be read or written."""

    exit_code = 74
    reason = "io"


class LostOwnershipError(FnetError):
    """A later attempt owns the run; this one writes nothing more."""

    exit_code = 75
    reason = "lost_ownership"


_STEP_NOTE = "after step "


def note_step(error: BaseException, step: int) -> None:
    """Add the step that was completed before `error`; a traceback shows it below the error."""
    error.add_note(f"{_STEP_NOTE}{step:,}")


def noted_step(error: BaseException) -> int | None:
    """Return what `note_step` added; None for an error before the first or after the last step."""
    notes: list[str] = getattr(error, "__notes__", [])
    found = (note.removeprefix(_STEP_NOTE) for note in notes if note.startswith(_STEP_NOTE))
    return next((int(step.replace(",", "")) for step in found), None)


def exception_line(error: BaseException) -> str:
    """Return "ValueError: message"."""
    return f"{type(error).__name__}: {error}"


def describe(error: OSError) -> str:
    """Return an OSError in one line, with its file name if it has one."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def peer_left(error: BaseException) -> bool:
    """Return True if `error` says only that another rank closed its connection: the cause is on that rank."""
    # gloo raises a plain RuntimeError, NCCL a DistBackendError for all it finds: only the text tells. An OSError is of
    # this process alone, as when the reader of its output has gone.
    return not isinstance(error, OSError) and names_lost_peer(str(error))


def names_lost_peer(text: str) -> bool:
    """Return True if `text`, of an error of gloo or NCCL or of a log, says that another rank closed its connection."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "connectFullMesh")  # gloo
    nccl = ("ncclRemoteError", "remote process exited", "closed by remote peer")
    return any(sign in text for sign in (*signs, *nccl))
