"""The ranks of one attempt on this node: start the processes, watch them, forward signals, and end all of them.

Ranks get the environment variables that torchrun sets, and a few of our own (fnet_dist/distributed/launch_env.py).
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.fork_server import ForkedProcess, ForkServer
from fnet_dist.processes import python_environment
from fnet_dist.run.attempt import HEARTBEAT_EVERY_S, Attempt
from fnet_dist.run.log import LOGGER
from fnet_dist.run.stop import SIGNALS, STOPPED_EXIT_CODES, reason_of_signal
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import add_meeting

GRACE_S = 3.0  # for the others to leave by themselves after a rank has failed
PROGRAM = (sys.executable, "-m", "fnet_dist.train")
LOOK_EVERY_S = 0.05  # short: it is also how late the printed log of rank 0 is


@dataclass
class Worker:
    """A rank's process; `ended_by_us` if it was killed only because another one had failed."""

    rank: int
    process: subprocess.Popen[bytes] | ForkedProcess
    ended_by_us: bool = False

    @property
    def has_failed(self) -> bool:
        """True if it has ended by itself, and neither finished nor stopped on request."""
        return self.process.returncode not in (None, 0, *STOPPED_EXIT_CODES)


@dataclass
class Workers:
    """The ranks of this node. Signals that reach the launcher are forwarded to them, each once."""

    running: list[Worker] = field(default_factory=list)
    stop_signal: str = ""  # name of the last signal that asked for a stop
    stop_signal_at: float = math.inf  # time of the first one, on the monotonic clock
    fork_server: ForkServer | None = None  # from the first attempt to the launcher's end
    in_job: bool = False  # of Slurm, which may send SIGINT twice: itself, and by way of another process

    def forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward signal `number`: a terminal's Ctrl-C reaches only us. A second Ctrl-C kills the ranks."""
        # A rank that waits inside a collective runs no signal handler of Python: only SIGKILL ends it.
        again = number == signal.SIGINT and self.stop_signal == "SIGINT" and not self.in_job
        self.stop_signal = signal.Signals(number).name
        self.stop_signal_at = min(self.stop_signal_at, time.monotonic())
        for worker in self._alive():
            worker.process.send_signal(signal.SIGKILL if again else number)
            worker.ended_by_us |= again

    @property
    def stop_reason(self) -> str:
        """The reason in outcome.json for the signal that asked for a stop; "" while none did."""
        return reason_of_signal(signal.Signals[self.stop_signal]).name if self.stop_signal else ""

    def start(
        self, attempt: Attempt, config: Config, node_spec: NodeSpec, meeting: Mapping[str, str], listen_fd: int | None
    ) -> None:
        """Start this node's ranks of `attempt`. They read the run's config.json, and nothing else says a setting.

        `meeting` holds the variables by which all ranks of the run connect, `config` this node's own settings: only its
        directory of the data counts, which may be elsewhere on another node. Signals are blocked meanwhile, and in a
        rank until it has its handlers: none is lost, and none kills it.
        """
        arguments, env = _arguments(attempt, config), _common_environment(node_spec)
        if config.parallel.fork_ranks:
            self._open_fork_server(arguments, env, attempt.log(node_spec.ranks[0]))
        with signals_blocked():
            for local_rank, rank in enumerate(node_spec.ranks):
                attempt.error(rank).unlink(missing_ok=True)  # a rank writes it only when it fails
                own = add_meeting({**env, **_rank_environment(attempt, node_spec, local_rank)}, meeting)
                pass_fds: tuple[int, ...] = ()
                if listen_fd is not None and rank == 0:
                    own["FNET_LISTEN_FD"], pass_fds = str(listen_fd), (listen_fd,)
                with attempt.log(rank).open("ab") as log:
                    process = self._start_rank(arguments, own, log, pass_fds)
                LOGGER.debug(f"rank {rank} starts: process {process.pid}")
                self.running.append(Worker(rank, process))
                if self.stop_signal:  # it came before this rank was there to get it
                    process.send_signal(signal.Signals[self.stop_signal])

    def _open_fork_server(self, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Start the fork server, unless it runs, and wait until it is ready; a stop that is asked for ends the wait."""
        if self.fork_server is None:
            with signals_blocked(), log.open("ab") as output:
                self.fork_server = ForkServer([*PROGRAM, *arguments], env, output)
            try:
                self.fork_server.wait_until_ready(lambda: bool(self.stop_signal))
            except OSError as error:
                self._close_fork_server(error)

    def _start_rank(
        self, arguments: Sequence[str], env: Mapping[str, str], log: IO[bytes], pass_fds: Sequence[int]
    ) -> subprocess.Popen[bytes] | ForkedProcess:
        """Fork a rank from the fork server, or start it by itself if there is none or it has ended."""
        try:
            if self.fork_server is not None:
                return self.fork_server.fork(arguments, env, log, log, pass_fds)
        except OSError as error:
            self._close_fork_server(error)
        return subprocess.Popen(
            [*PROGRAM, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,  # a terminal sends Ctrl-C to its whole foreground group
            pass_fds=pass_fds,
        )

    def watch(self, each_look: Callable[[], None], is_over: Callable[[], bool]) -> list[Worker]:
        """Wait for the end of all ranks; once one has failed, or `is_over`, kill those that run on after GRACE_S."""
        deadline, announced, next_look = math.inf, False, 0.0
        while self._alive():
            each_look()
            if self.stop_signal and not announced:
                announced = True
                LOGGER.info(f"{self.stop_signal}: saving and stopping; Ctrl-C twice ends at once, without saving")
            ending = any(worker.has_failed for worker in self.running)
            now = time.monotonic()
            if now >= next_look and deadline == math.inf:  # not at every turn: each node asks the disk that all share
                ending, next_look = is_over() or ending, now + HEARTBEAT_EVERY_S
            if ending:
                deadline = min(deadline, now + GRACE_S)
            if now > deadline:
                self.kill()
            time.sleep(LOOK_EVERY_S)
        each_look()
        ended, self.running = self.running, []
        for worker in ended:
            by_us = ", killed by this launcher" if worker.ended_by_us else ""
            LOGGER.debug(f"rank {worker.rank} has ended: exit code {worker.process.returncode}{by_us}")
        return ended

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for worker in self._alive():
            worker.ended_by_us = True
            worker.process.kill()

    def close(self) -> None:
        """Kill what still runs, the fork server too."""
        self.kill()
        if self.fork_server is not None:
            self.fork_server.close()

    def _close_fork_server(self, error: OSError) -> None:
        """Close the fork server, which cannot be used; ranks are started by themselves then."""
        LOGGER.debug(f"ranks are not forked: {error}")
        if self.fork_server is not None:
            self.fork_server.close()
        self.fork_server = None

    def _alive(self) -> list[Worker]:
        """Return the ranks that still run. Polls each one, so that every exit code is known."""
        return [worker for worker in self.running if worker.process.poll() is None]


def chosen_interface() -> str | None:
    """Return the network interface for the connections between nodes, where GLOO_SOCKET_IFNAME names one."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def chosen_notify() -> tuple[str, ...] | None:
    """Return the command for notices that FNET_NOTIFY names, as words, none if it is empty; None if it is not set."""
    text = os.environ.get("FNET_NOTIFY")
    try:
        return None if text is None else tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"FNET_NOTIFY={text!r}: {error}; expected a command, with quotes that close") from None


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals that ask for a stop, here and in processes that start inside: they have no handlers yet."""
    blocked = {*SIGNALS, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def _arguments(attempt: Attempt, config: Config) -> list[str]:
    data_root = getattr(config.data, "root", None)  # your own data may have none
    own = [] if data_root is None else ["--data.root", data_root]
    return ["--config", str(attempt.run.config), *own]


def _common_environment(node_spec: NodeSpec) -> dict[str, str]:
    """Return what all ranks of this node have in their environment, in each attempt."""
    # In a rank that torchrun started, its variables would be taken for those of a restart.
    env = {name: value for name, value in python_environment().items() if not name.startswith("TORCHELASTIC_")}
    if node_spec.nproc_per_node > 1:
        env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
    return {**env, "PYTHONUNBUFFERED": "1"}  # a killed rank has its last lines in the log


def _rank_environment(attempt: Attempt, node_spec: NodeSpec, local_rank: int) -> dict[str, str]:
    rank = node_spec.ranks[local_rank]
    own: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "GROUP_RANK": node_spec.node_rank,
        "WORLD_SIZE": node_spec.world_size,
        "LOCAL_WORLD_SIZE": node_spec.nproc_per_node,
        "TORCHELASTIC_ERROR_FILE": attempt.error(rank),
        "FNET_ATTEMPT": attempt.number,
        "FNET_LAUNCHER": os.getpid(),  # a rank ends when this process is gone
        "FNET_NOTICES": "1" if node_spec.notify else "",
    }
    return {name: str(value) for name, value in own.items()}
