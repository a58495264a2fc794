"""Run a command: return its exit code, and print an error as one line on standard error."""

import sys
from collections.abc import Callable, Sequence

from fnet_dist.errors import FnetError, StorageError, describe
from fnet_dist.processes import prepare_output
from fnet_dist.run.log import mute, write
from slurm.errors import SlurmError

READER_HAS_LEFT = 141  # in the middle of a command (`| head`): 128 + SIGPIPE, as a shell reports it


def run_command(command: Callable[..., int], *arguments: Sequence[str] | str) -> int:
    """Call `command` and return its exit code. Print an expected error (errors.py) instead of raising it."""
    prepare_output()
    try:
        code = command(*arguments)
    except SystemExit as request:  # of argparse: 0 after its help, 2 after an error; of rich: 1, its reader has left
        code = {None: 0, 0: 0, 2: 2}[request.code] if request.code in (None, 0, 2) else READER_HAS_LEFT
    except (FnetError, SlurmError) as error:
        code = print_error(str(error), error.exit_code)
    except BrokenPipeError:
        code = READER_HAS_LEFT
    except OSError as error:
        code = print_error(describe(error), StorageError.exit_code)
    try:
        sys.stdout.flush()  # here, not at exit: a full disk raises where it is handled
    except BrokenPipeError:  # the command itself has ended
        mute(sys.stdout)
    except OSError as error:
        code = print_error(describe(error), StorageError.exit_code)
    return code


def print_error(text: str, code: int) -> int:
    """Print an error in one line; return `code`."""
    write(f"error: {text}\n", sys.stderr)
    return code
