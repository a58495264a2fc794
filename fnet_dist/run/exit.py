"""End a rank: print why, write torchrun's error file, exit with the code of errors.py."""

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.errors import FnetError, SampleError, noted_step, peer_left
from fnet_dist.run.console import resume_command
from fnet_dist.run.log import LOGGER
from fnet_dist.run.outcome import classify_error
from fnet_dist.run.stop import StoppedError


def exit_process(code: int) -> NoReturn:
    """Exit with `code` at once, without the interpreter's finalization."""
    # gloo's threads can outlive their process group. If one still runs while Python finalizes, the process dies with
    # SIGABRT ("terminate called without an active exception") after everything went well.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_with_error(launch_env: LaunchEnv, error: BaseException) -> int:
    """Print `error`, write the error file for the launcher, and return the exit code.

    Only a rank that failed by itself prints a traceback. A rank that lost its connection to another one prints a line:
    the first traceback in a log is then the cause.
    """
    _, reason, exit_code = classify_error(error)
    message = trace = str(error)
    step = noted_step(error)
    aftermath = not isinstance(error, FnetError) and peer_left(error)
    if isinstance(error, StoppedError):
        if launch_env.is_rank0:
            LOGGER.info(message)
            if launch_env.launcher is None:  # `fnet run` prints the command that it was started with
                LOGGER.info(f"to go on: {resume_command(error.run, launch_env.local_world_size)}")
    elif isinstance(error, FnetError):
        if launch_env.local_rank == 0 or isinstance(error, SampleError):  # else all ranks raise it: one line a node
            LOGGER.error(error)
    elif aftermath:
        message = trace = f"rank {launch_env.rank} lost the connection to another rank, which ended first"
        LOGGER.error(message)
    else:
        message, trace = f"{type(error).__name__}: {error}", ""
        if step is not None:
            message += f" (after step {step:,})"
        if not isinstance(error, KeyboardInterrupt):
            trace = "".join(traceback.format_exception(error))
            with suppress(OSError):
                sys.stderr.write(trace)
    with suppress(OSError):  # a full disk
        write_error_file(launch_env, message, trace, reason, aftermath=aftermath, step=step)
    return exit_code
