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


class NonFiniteError(FnetError):
    """A loss or gradient became infinite or not a number."""

    reason = "non_finite"


class StorageError(FnetError):
    """The run directory could not be read or written."""

    exit_code = 74
    reason = "io"


def describe(error: OSError) -> str:
    """An OSError in one line; only some of them name a file."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
