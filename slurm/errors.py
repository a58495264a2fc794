"""Errors of Slurm and of its options."""


class SlurmError(Exception):
    """A Slurm program refused, is missing or does not answer; the text says which."""

    exit_code = 1


class NoAnswerError(SlurmError):
    """slurmctld is away or too slow. The same call may succeed later."""


class EndingError(SlurmError):
    """Somebody is ending the job. The call would undo that."""


class OptionError(SlurmError):
    """A value cannot be written into a script or a command. Nothing was written."""

    exit_code = 2  # as argparse: the command line or site.toml is wrong
