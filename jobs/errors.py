"""How a command ends: with an exit code, and of an error one line on standard error."""

import sys
from collections.abc import Callable, Sequence

from fnet_dist.errors import FnetError, StorageError, describe
from slurm.errors import SlurmError


def run_command(command: Callable[..., int], *arguments: Sequence[str] | str) -> int:
    """The exit code of `command`; what is wrong is said here, and not raised."""
    code = 1
    try:
        code = command(*arguments)
        sys.stdout.flush()
    except (FnetError, SlurmError) as error:
        return print_error(str(error), error.exit_code)
    except BrokenPipeError:  # `| head` has seen enough
        from fnet_dist.run.console import mute  # imports rich, which doctor must be able to miss

        mute(sys.stdout)
    except OSError as error:
        return print_error(describe(error), StorageError.exit_code)
    return code


def print_error(text: str, code: int) -> int:
    """Say what is wrong, in one line, and return `code`."""
    print(f"error: {text}", file=sys.stderr)
    return code
