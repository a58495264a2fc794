"""Start `python -m MODULE` from a fork server of this pytest process: each import of torch costs seconds of a core.

The process is like any other, and a child of ours; only torch is imported already. That also holds for the processes
that it starts: torchrun's ranks, the launcher's fork server, the ranks of `fnet doctor`.
"""

import atexit
import inspect
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

from fnet_dist.fork_server import ForkedProcess, ForkServer, serve
from fnet_dist.processes import CODE_ROOT, name_process
from fnet_dist.run.log import LOGGER

MODULES = ("fnet_dist.train", "jobs", "jobs.doctor.allreduce_check", "torch.distributed.run")
# Variables that Python and its libraries read before or while torch is imported; not those that say where code lies.
READ_AT_THE_START = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "LD_", "TORCH_", "COVERAGE_")
READ_LATER = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "TORCH_FR", "TORCH_NCCL")
ONE_AT_A_TIME = threading.Lock()  # some tests start several, in threads


class ForkedPython(ForkedProcess):
    """The methods of subprocess.Popen that tests use."""

    def __init__(self, pid: int, stdout: IO[str]) -> None:
        super().__init__(pid)
        self.stdout = stdout

    def terminate(self) -> None:
        """Send SIGTERM, unless the process has ended."""
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> Any:
        """Wait for its end; return the exit code. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.01)
        return self.returncode

    def __enter__(self) -> "ForkedPython":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait(10)


def fork_python(words: Sequence[str], cwd: Path, env: Mapping[str, str], stderr: IO[Any]) -> ForkedPython | None:
    """Fork what `python WORDS` would start in `cwd` with `env`; return None if it must be started by itself."""
    if Path(words[0]).name == "fnet":
        words = ["-m", "jobs", *words[1:]]  # as its script does
    if _module_of(words) is None:
        return None
    read, write = os.pipe()
    with ONE_AT_A_TIME, os.fdopen(write, "wb") as stdout:
        server = _server(tuple(sorted(_read_at_the_start(env).items())))
        return ForkedPython(server.fork([str(cwd), *words], env, stdout, stderr).pid, os.fdopen(read, encoding="utf-8"))


def _module_of(words: Sequence[str]) -> str | None:
    """Return MODULE of `[-u] -m MODULE ...`, if it can be forked."""
    module = words[words[0] == "-u" :][:2]
    return module[1] if len(module) == 2 and module[0] == "-m" and module[1] in MODULES else None


def _read_at_the_start(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if name.startswith(READ_AT_THE_START) and not name.startswith(READ_LATER)
    }


@cache
def _server(common: tuple[tuple[str, str], ...]) -> ForkServer:
    """Start the server for processes with these variables in common. It ends with this process."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    before = Path.cwd()
    os.chdir(CODE_ROOT)
    try:
        command = [sys.executable, "-m", "tests.helpers.forked_python"]
        server = ForkServer(command, {**kept, **dict(common)}, sys.__stderr__.buffer)
    finally:
        os.chdir(before)
    server.wait_until_ready(lambda: False)
    return server


class _ForkingPopen(subprocess.Popen[Any]):
    """Fork Python processes in place of starting them, where their environment allows it."""

    # Private, and so not in typeshed: it is the one place where Popen starts the process, with its pipes made.
    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else [""]
        given = inspect.signature(super()._execute_child).bind(args, *rest).arguments  # type: ignore[misc]
        env = os.environ if given["env"] is None else given["env"]
        same = _read_at_the_start(env) == _read_at_the_start(os.environ)
        if words[0] != sys.executable or _module_of(words[1:]) is None or given["preexec_fn"] is not None or not same:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else both processes print what is buffered
        if (pid := os.fork()) == 0:
            try:
                _become(given, dict(env))
                _run(str(given["cwd"] or Path.cwd()), words[1:])
            finally:
                os._exit(1)
        self.pid, self._child_created = pid, True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


def _become(given: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Take on what `subprocess.Popen` was given, as a process has it after exec."""
    atexit._clear()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    LOGGER.handlers.clear()
    if given["start_new_session"]:
        os.setsid()
    elif given["process_group"] != -1:
        os.setpgid(0, given["process_group"])
    for number, descriptor in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"])):
        if descriptor not in (-1, number):
            os.dup2(descriptor, number)
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in given["pass_fds"]:
            with suppress(OSError):  # the listing's own
                os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)


def _run(cwd: str, words: Sequence[str]) -> NoReturn:
    """Run the module of `words` as `python WORDS` does in `cwd`, and exit."""
    name_process("python")
    os.chdir(cwd)
    sys.path[0] = cwd
    module = _module_of(words) or ""
    if "-u" in words[:1] or "PYTHONUNBUFFERED" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]  # typeshed: any TextIO
    sys.argv[1:] = words[words.index(module) + 1 :]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]  # a class is replaced
    serve("fnet_dist.training.trainer", "torch.fx.experimental.symbolic_shapes", "jobs.commands.run")
    _run(sys.argv[1], sys.argv[2:])
