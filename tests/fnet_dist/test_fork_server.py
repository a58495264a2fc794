"""Forked processes behave as if the launcher had started each by itself: a small program stands for the ranks'."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnet_dist.fork_server import ForkedProcess, ForkServer
from fnet_dist.processes import set_subreaper
from tests.helpers.processes import REPOSITORY, all_gone, wait_until

# A forked process runs its only argument, Python code.
PROGRAM = """
import os, signal, sys, time
from fnet_dist.fork_server import serve
serve("json")
exec(sys.argv[1])
"""
COMMAND = (sys.executable, "-c", PROGRAM)
ENV = {"PYTHONPATH": str(REPOSITORY), "COMMON": "1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    with (tmp_path / "server.log").open("wb") as log:
        server = ForkServer(COMMAND, ENV, log)
    server.wait_until_ready(lambda: False)
    yield server
    server.close()


def fork(server: ForkServer, log: Path, code: str, *pass_fds: int, **env: str) -> ForkedProcess:
    with log.open("ab") as output:
        return server.fork([code], env, output, output, pass_fds)


def exit_code(process: ForkedProcess) -> int:
    wait_until(lambda: process.poll() is not None, 10)
    return process.returncode


def test_it_has_the_given_arguments_environment_and_output_and_the_launcher_as_its_parent(
    server: ForkServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    show = "print(dict(os.environ), os.getppid(), os.getpgrp() == os.getpid(), 'json' in sys.modules, flush=True)"
    process = fork(server, log, f"{show}; os.system('echo of a child'); sys.exit(7)", RANK="3")
    assert exit_code(process) == 7
    seen = f"{{'RANK': '3'}} {os.getpid()} True True"
    assert log.read_text() == f"before\n{seen}\nof a child\n"


def test_a_signal_handler_may_ask_for_the_end_while_it_is_asked_for(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between waitpid(2), after which the kernel does not know the process any more, and the next line."""
    process, waitpid = fork(server, tmp_path / "log", "sys.exit(7)"), os.waitpid
    asked = []

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        ended = waitpid(pid, options)
        if ended[0]:
            asked.append(process.poll())
            process.send_signal(signal.SIGTERM)
        return ended

    monkeypatch.setattr(os, "waitpid", interrupted)
    assert exit_code(process) == 7
    assert asked == [None]


def test_a_signal_reaches_it_and_names_its_end(server: ForkServer, tmp_path: Path) -> None:
    process = fork(server, tmp_path / "log", "signal.pause()")
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert exit_code(process) == -signal.SIGUSR1
    process.kill()  # its number may be another process's by now
    assert process.returncode == -signal.SIGUSR1


def test_a_passed_file_descriptor_keeps_its_number(server: ForkServer, tmp_path: Path) -> None:
    read, write = os.pipe()
    high = os.dup(write) if write > 40 else os.dup2(write, 47, inheritable=False)
    assert exit_code(fork(server, tmp_path / "log", f"os.write({high}, b'passed')", high)) == 0
    assert os.read(read, 10) == b"passed"
    for descriptor in (read, write, high):
        os.close(descriptor)


def test_signals_that_its_launcher_blocks_are_blocked_in_it_and_wait(tmp_path: Path) -> None:
    with (tmp_path / "server.log").open("wb") as log:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            server = ForkServer(COMMAND, ENV, log)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    server.wait_until_ready(lambda: False)
    handle = "signal.signal(10, lambda *_: sys.exit(75)); signal.pthread_sigmask(signal.SIG_UNBLOCK, [10])"
    process = fork(server, tmp_path / "log", f"{handle}; signal.pause()")
    process.send_signal(signal.SIGUSR1)
    assert exit_code(process) == 75
    server.close()


def test_a_server_that_has_ended_or_is_not_waited_for_is_an_oserror(server: ForkServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not needed any more"):
        server.wait_until_ready(lambda: True)
    server.close()
    with pytest.raises(OSError, match=r"."):
        fork(server, tmp_path / "log", "pass")
    with (tmp_path / "server.log").open("wb") as log:
        broken = ForkServer((sys.executable, "-c", "raise SystemExit(3)"), ENV, log)
    with pytest.raises(OSError, match="the fork server has ended"):
        broken.wait_until_ready(lambda: False)
    broken.close()


NOT_RELEASED = """
import os
from fnet_dist.fork_server import _fork_sibling
forked = _fork_sibling()
if forked is None:
    print("ran", flush=True)
else:
    print(forked[0], flush=True)
"""


def test_a_process_of_which_the_launcher_was_not_told_exits_without_running() -> None:
    """As if the server was killed in the middle of a request: its descriptors are closed."""
    set_subreaper(True)
    try:
        command = [sys.executable, "-c", NOT_RELEASED]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, timeout=30).stdout
    finally:
        set_subreaper(False)
    _, status = os.waitpid(int(said), 0)
    assert os.waitstatus_to_exitcode(status) == 1


LAUNCHER = """
import sys, time
from fnet_dist.fork_server import ForkServer
program, rank = sys.argv[1:]
server = ForkServer((sys.executable, "-c", program), {}, sys.stderr.buffer)
server.wait_until_ready(lambda: False)
process = server.fork([rank], {}, sys.stdout.buffer, sys.stderr.buffer)
print(server._process.pid, process.pid, flush=True)
time.sleep(60)
"""


def test_a_launcher_that_is_killed_leaves_neither_server_nor_forked_processes() -> None:
    rank = "from fnet_dist.processes import exit_with_parent; exit_with_parent(); print(flush=True); signal.pause()"
    command = [sys.executable, "-c", LAUNCHER, PROGRAM, rank]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        lines = [launcher.stdout.readline() for _ in range(2)]  # one of them is empty, in either order
        launcher.kill()
    assert all_gone([int(word) for line in lines for word in line.split()])
