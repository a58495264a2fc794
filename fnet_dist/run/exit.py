"""How a rank leaves: it says why, tells its launcher, and has an exit code."""

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.errors import FnetError, peer_left
from fnet_dist.run.console import resume_command
from fnet_dist.run.outcome import classify_error
from fnet_dist.run.stop import StoppedError


def exit_process(code: int) -> NoReturn:
    """Leave with `code`, at once and without the interpreter's teardown.

    gloo's threads can outlive their process group; if one is alive when Python takes itself apart, the process dies by
    SIGABRT ("terminate called without an active exception") after everything went well.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_with_error(launch_env: LaunchEnv, error: BaseException) -> int:
    """Say and tell what `error` ended this rank with; its exit code (see errors.py).

    The first traceback in a log is the failing rank's: a rank that only lost another one shows none.
    """
    _, reason, exit_code = classify_error(error)
    what, trace, lost = f"{type(error).__name__}: {error}", "", False
    if isinstance(error, StoppedError):
        what = trace = str(error)
        if launch_env.is_rank0:
            print(what)
            if launch_env.launcher is None:  # which knows better how it was started
                print(f"to go on: {resume_command(error.run, launch_env.local_world_size)}")
    elif isinstance(error, FnetError):
        what = trace = str(error)
        if launch_env.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
    elif peer_left(error):
        lost = True
        what = trace = f"rank {launch_env.rank} lost the connection to another rank, which ended first"
        print(f"error: {what}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        trace = "".join(traceback.format_exception(error))
        with suppress(OSError):
            sys.stderr.write(trace)
    with suppress(OSError):  # a full disk
        write_error_file(launch_env, what, trace, reason, aftermath=lost)
    return exit_code
