"""Run a command: return its exit code, and print an error as one line on standard error."""

import sys
from collections.abc import Callable, Sequence

from fnet_dist.errors import FnetError, StorageError, describe
from fnet_dist.processes import prepare_output
from slurm.errors import SlurmError


def run_command(command: Callable[..., int], *arguments: Sequence[str] | str) -> int:
    """Call `command` and return its exit code. Print an expected error (errors.py) instead of raising it."""
    prepare_output()
    code = 0  # if the reader leaves before the command has ended
    try:
        try:
            code = command(*arguments)
        except (
            SystemExit
        ) as request:  # of argparse: 0 after its help, 2 after an error; of rich: 1, its reader has left
            code = 2 if request.code == 2 else 0
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
