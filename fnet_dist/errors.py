"""The errors a run ends with: what each exit code and `reason` of outcome.json means is said here once."""


class FnetError(Exception):
    """An end that is explained in one line: what was found, what was expected, what to do next."""

    exit_code = 1
    reason = "crash"


class ConfigError(FnetError):
    """A bad setting, command line or start; nothing was written."""

    exit_code = 2


class DataError(FnetError):
    """The data set is missing or damaged; trying again will not help."""

    exit_code = 65
    reason = "data"


class CheckpointError(FnetError):
    """No checkpoint of a run is whole; trying again will not help, and starting anew would hide it."""

    exit_code = 65
    reason = "checkpoint"


class NonFiniteError(FnetError):
    """A loss or gradient became infinite or not a number; the same steps would give it again."""

    reason = "non_finite"


class DesyncError(FnetError):
    """Ranks have different weights: one of them computed or kept something wrong, as a broken memory does."""

    reason = "desync"


class StorageError(FnetError):
    """The run directory could not be read or written."""

    exit_code = 74
    reason = "io"


class LostOwnershipError(FnetError):
    """A later attempt owns the run: this one writes nothing more."""

    exit_code = 75
    reason = "lost_ownership"


def describe(error: OSError) -> str:
    """An OSError in one line; only some of them name a file."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def peer_left(error: BaseException) -> bool:
    """Whether `error` only says that another rank's connection broke: the cause lies there, not here."""
    text = str(error)  # an OSError is our own: a reader of our output that has gone, say
    return not isinstance(error, OSError) and any(
        words in text for words in ("closed by peer", "reset by peer", "Broken pipe", "connectFullMesh")
    )
