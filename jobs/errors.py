"""Run a command: return its exit code, and print an error as one line on standard error."""

import sys
from collections.abc import Callable, Sequence

from fnet_dist.errors import FnetError, StorageError, describe
from slurm.errors import SlurmError


def run_command(command: Callable[..., int], *arguments: Sequence[str] | str) -> int:
    """Call `command` and return its exit code. Print an expected error (errors.py) instead of raising it."""
    code = 1
    try:
        code = command(*arguments)
        sys.stdout.flush()  # here, not at exit: a full disk or closed pipe raises where it is handled
    except (FnetError, SlurmError) as error:
        return print_error(str(error), error.exit_code)
    except BrokenPipeError:  # `| head` has seen enough
        from fnet_dist.run.log import mute  # imports pydantic, without which doctor must run

        mute(sys.stdout)
    except OSError as error:
        return print_error(describe(error), StorageError.exit_code)
    return code


def print_error(text: str, code: int) -> int:
    """Print an error in one line; return `code`."""
    print(f"error: {text}", file=sys.stderr)
    return code
