"""Start training processes that a test can watch and signal; all are killed when the test ends."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

from fnet_dist.processes import children, is_running
from tests.helpers.forked_python import ForkedPython, fork_python

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
TRAINER = ("-m", "fnet_dist.train")
JOBS_RUN = ("-m", "jobs", "run")
# A rank whose data set fails; the next argument is the fault: see faulty_data.py.
FAULTY = ("-m", "fnet_dist.train", "--run.name", "job", "--recipe", "tests.helpers.faulty_data", "--data.fault")
# Nothing listens on this port: every request for the internet is refused at once.
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a process that has ended."""

    code: int
    out: str
    err: str


@dataclass
class Started:
    """A process that may still run; its standard error is kept in a file, so that nothing waits for a reader."""

    process: subprocess.Popen[str] | ForkedPython
    errors: IO[str]

    def line(self) -> str:
        """Wait for the next line of its standard output and return it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, timeout_s: float = 60) -> Ended:
        """Wait for its end; return what it printed since the last `line()` and all of its standard error."""
        code = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.errors.seek(0)
        return Ended(code, self.process.stdout.read(), self.errors.read())


@contextmanager
def start(*words: str, cwd: Path = REPOSITORY, umask: int = -1, **environment: str) -> Iterator[Started]:
    """Start `python WORDS` in `cwd`; on exit kill it and its children. A `umask` of -1 keeps the current one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = (fork_python(words, cwd, env, errors) if umask == -1 else None) or subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            umask=umask,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                yield Started(process, errors)
            finally:
                for pid in [*children(process.pid), process.pid]:
                    if is_running(pid):
                        os.killpg(pid, signal.SIGKILL)


@contextmanager
def start_ranks(programs: Sequence[Sequence[str]], **environment: str) -> Iterator[list[Started]]:
    """Start one process for each of `programs` as the ranks of one process group, without torchrun's agent.

    Each rank's exit code can be seen, and no agent kills a rank because another failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {
        "WORLD_SIZE": str(len(programs)),
        "LOCAL_WORLD_SIZE": str(len(programs)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(start(*words, **environment, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank, words in enumerate(programs)
        ]


def torchrun(nproc: int) -> tuple[str, ...]:
    """Return the arguments between `python` and a program that start it on `nproc` ranks."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}")


def words_after_python(command: str) -> list[str]:
    """Return the words after `python` that run a printed `command`: `fnet` is a script of Python's."""
    program, *words = shlex.split(command)
    return [shutil.which(program) or program, *words] if Path(program).name == "fnet" else words


def wait_until(condition: Callable[[], T], timeout_s: float = 60) -> T:
    """Poll `condition` until it returns something true, and return that; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"the condition was not met within {timeout_s:g} s"
        time.sleep(0.03)  # most conditions read a metrics log from its start
    return found


def all_gone(pids: Sequence[int], timeout_s: float = 2) -> bool:
    """Return True once none of the processes runs; fail after `timeout_s`."""
    return wait_until(lambda: not any(map(is_running, pids)), timeout_s)
