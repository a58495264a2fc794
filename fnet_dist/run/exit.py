"""End a rank: print why, write torchrun's error file, exit with the code of errors.py."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NoReturn

from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.errors import FnetError, NonFiniteError, SampleError, SharedError, noted_step, peer_left
from fnet_dist.run.attempt import Attempt
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


@contextmanager
def record_failure(launch_env: LaunchEnv, attempt: Attempt) -> Iterator[None]:
    """Write why the block failed into the attempt's directory, for `fnet status`. `fnet run` lets its ranks do that."""
    try:
        yield
    except BaseException as error:
        if launch_env.attempt is None:
            _write_failure(replace(launch_env, error_file=attempt.error(launch_env.rank)), error)
        raise


def exit_with_error(launch_env: LaunchEnv, error: BaseException) -> int:
    """Print `error`, write the error file for the launcher, and return the exit code.

    Only a rank that failed by itself prints a traceback. A rank that lost its connection to another one prints a line:
    the first traceback in a log is then the cause.
    """
    if isinstance(error, StoppedError):
        if launch_env.is_rank0:
            LOGGER.info(error)
            if launch_env.launcher is None:  # `fnet run` prints the command that it was started with
                LOGGER.info(f"to go on: {resume_command(error.run, launch_env.local_world_size)}")
    elif isinstance(error, FnetError):
        if launch_env.local_rank == 0 or isinstance(error, SampleError):  # else all ranks raise it: one line a node
            LOGGER.error(error)
    elif peer_left(error):
        LOGGER.error(_lost_connection(launch_env))
    elif not isinstance(error, KeyboardInterrupt):
        with suppress(OSError):
            sys.stderr.write("".join(traceback.format_exception(error)))
    _write_failure(launch_env, error)
    return classify_error(error)[2]


def _write_failure(launch_env: LaunchEnv, error: BaseException) -> None:
    """Write the error file, whose message is one line and whose trace torchrun prints."""
    step, aftermath = noted_step(error), False
    if isinstance(error, FnetError):
        message = trace = str(error)
    elif aftermath := peer_left(error):
        message = trace = _lost_connection(launch_env)
    else:
        message = f"{type(error).__name__}: {error}" + ("" if step is None else f" (after step {step:,})")
        trace = "" if isinstance(error, KeyboardInterrupt) else "".join(traceback.format_exception(error))
    reason, shared = classify_error(error)[1], dict[str, Any]()
    if isinstance(error, SharedError):
        shared["rank_at_fault"] = error.rank
    if isinstance(error, NonFiniteError) and launch_env.is_rank0:
        shared["samples"] = error.samples
    with suppress(OSError):  # a full disk
        write_error_file(launch_env, message, trace, reason, aftermath=aftermath, step=step, shared=shared)


def _lost_connection(launch_env: LaunchEnv) -> str:
    return f"rank {launch_env.rank} lost the connection to another rank, which ended first"
