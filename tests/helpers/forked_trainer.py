"""Start `python -m fnet_dist.train` from a fork server of this pytest process: each import of torch costs seconds.

The trainer is a process like any other, and a child of ours. Only its first seconds differ: torch is imported already.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from fnet_dist.fork_server import ForkedProcess, ForkServer
from fnet_dist.processes import CODE_ROOT

PROGRAM = ("-m", "fnet_dist.train")
# Variables that Python, its libraries and coverage read before or while torch is imported.
READ_AT_THE_START = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "LD_", "TORCH_", "COVERAGE_")
ONE_AT_A_TIME = threading.Lock()  # some tests start several, in threads


class ForkedTrainer(ForkedProcess):
    """The methods of subprocess.Popen that tests use."""

    def __init__(self, pid: int, stdout: IO[str]) -> None:
        super().__init__(pid)
        self.stdout = stdout

    def wait(self, timeout: float) -> Any:
        """Wait for its end; return the exit code. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(PROGRAM, timeout)
            time.sleep(0.01)
        return self.returncode

    def __enter__(self) -> "ForkedTrainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait(10)


def fork_trainer(words: Sequence[str], env: Mapping[str, str], stderr: IO[Any]) -> ForkedTrainer | None:
    """Fork a trainer with the arguments `words[2:]` and with `env`; return None if it must be started by itself."""
    common = {name: value for name, value in env.items() if name.startswith(READ_AT_THE_START)}
    if tuple(words[:2]) != PROGRAM or "COVERAGE_PROCESS_CONFIG" in common:
        return None
    read, write = os.pipe()
    with ONE_AT_A_TIME, os.fdopen(write, "wb") as stdout:
        server = _server(tuple(sorted(common.items())))
        return ForkedTrainer(server.fork(words[2:], env, stdout, stderr).pid, os.fdopen(read, encoding="utf-8"))


@cache
def _server(common: tuple[tuple[str, str], ...]) -> ForkServer:
    """Start the server for trainers with these variables in common. It ends with this process."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    before = Path.cwd()
    os.chdir(CODE_ROOT)
    try:
        server = ForkServer([sys.executable, *PROGRAM], {**kept, **dict(common)}, sys.__stderr__.buffer)
    finally:
        os.chdir(before)
    server.wait_until_ready(lambda: False)
    return server
