"""Fork ranks from one process that has imported torch: each import takes seconds of a core, at every attempt.

The launcher starts the server (`ForkServer`), a process of the ranks' own program that imports torch, touches no GPU,
and waits (`serve`). A rank that it forks becomes a child of the launcher: its exit code is seen there, and it ends with
the launcher.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from fnet_dist.processes import exit_with_parent, name_process, prepare_output, set_subreaper

_SOCKET = "FNET_FORK_SERVER_FD"  # tells the program that it is the server
_LARGEST_MESSAGE = 1 << 20  # bytes
_LOOK_EVERY_S = 0.05
_FORK_S = 30.0  # takes 50 ms; a server that is stopped is given up, and killed


class ForkedProcess:
    """A child of this process that a fork server has forked. Behaves as subprocess.Popen does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | Any = None  # as typeshed has it for Popen
        self._is_asked = False

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        if self.returncode is None and not self._is_asked:  # a signal handler may ask again before this call is over
            self._is_asked = True
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            finally:
                self._is_asked = False
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send signal `number`, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The launcher's end of a fork server. All methods raise OSError if the server has ended."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> None:
        """Start `command`, which must call `serve`, with `env`; what it prints goes to `output`."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                command,
                env={**env, _SOCKET: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # a terminal sends Ctrl-C to its whole foreground group
                pass_fds=(theirs.fileno(),),
            )

    def wait_until_ready(self, give_up: Callable[[], bool]) -> None:
        """Wait until the server has imported its modules. Raises OSError if `give_up` returns True before."""
        self._socket.settimeout(_LOOK_EVERY_S)
        while not give_up():
            try:
                self._receive()
            except TimeoutError:
                continue
            self._socket.settimeout(_FORK_S)
            return
        raise OSError("the fork server is not needed any more")

    def fork(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[bytes],
        stderr: IO[bytes],
        pass_fds: Sequence[int] = (),
    ) -> ForkedProcess:
        """Fork a process with these arguments, environment and output, and nothing of ours; `pass_fds` as for Popen."""
        set_subreaper(True)  # the process that forks it ends, and the kernel gives it to us
        try:
            message = json.dumps({"arguments": arguments, "env": dict(env), "pass_fds": pass_fds})
            socket.send_fds(self._socket, [message.encode()], [stdout.fileno(), stderr.fileno(), *pass_fds])
            return ForkedProcess(int(self._receive()))
        finally:
            set_subreaper(False)

    def close(self) -> None:
        """Kill the server. Its forked processes run on."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _receive(self) -> bytes:
        if not (message := self._socket.recv(_LARGEST_MESSAGE)):
            raise ConnectionResetError("the fork server has ended")
        return message


def serve(*modules: str) -> None:
    """If a launcher has started this process as a fork server, import `modules` and fork a process for each request.

    Return only in the forked processes then, and else at once.
    """
    if _SOCKET not in os.environ:
        return
    exit_with_parent()
    prepare_output()
    name_process("fork server")
    server = socket.socket(fileno=int(os.environ.pop(_SOCKET)))
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # the collector of a forked process would write to each page that it shares with this one
    server.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, _LARGEST_MESSAGE, 3)
        if not message:
            os._exit(0)  # the launcher has ended
        if (forked := _fork_sibling()) is None:
            server.close()
            _become(json.loads(message), descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        pid, release = forked
        server.send(str(pid).encode())
        os.write(release, b"1")  # last: a process of which the launcher does not know must not run
        os.close(release)


def _fork_sibling() -> tuple[int, int] | None:
    """Fork a process that becomes a child of this process's parent, a subreaper; return None in it.

    Here, return its pid and a file descriptor: the process waits for a byte from there, and exits if none comes.
    """
    pid_read, pid_write = os.pipe()
    wait_read, wait_write = os.pipe()
    if (between := os.fork()) == 0:
        if (pid := os.fork()) != 0:
            os.write(pid_write, str(pid).encode())
            os._exit(0)
        for descriptor in (pid_read, pid_write, wait_write):
            os.close(descriptor)
        if not os.read(wait_read, 1):
            os._exit(1)  # the server was killed
        os.close(wait_read)
        return None
    os.waitpid(between, 0)  # from here on, the launcher is the parent
    pid = int(os.read(pid_read, 20))
    for descriptor in (pid_read, pid_write, wait_read):
        os.close(descriptor)
    return pid, wait_write


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Take on arguments, environment, output and file descriptors of `request`, in a process group of its own."""
    os.setpgid(0, 0)
    sys.argv[1:] = request["arguments"]
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, number in zip(descriptors, [1, 2, *request["pass_fds"]], strict=True):
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
