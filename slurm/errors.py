"""What goes wrong between us and Slurm."""


class SlurmError(Exception):
    """A Slurm program refused, is missing or does not answer; its text says what."""

    exit_code = 1


class NoAnswerError(SlurmError):
    """slurmctld is away, or takes too long: asked again later, it may answer."""


class EndingError(SlurmError):
    """The job is being ended by somebody's will: what is asked for would undo that."""


class OptionError(SlurmError):
    """What a script or a call of Slurm cannot hold was to be put into it; nothing was written."""

    exit_code = 2
