"""One attempt's processes on this node: started, watched, signalled, and in the end all gone.

Ranks get torchrun's variables, so that they cannot tell the difference, and a few of our own
(fnet_dist/distributed/launch_env.py).
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

from fnet_dist.config.environment import ENVIRONMENT, environment_of
from fnet_dist.config.schema import Config
from fnet_dist.run.attempt import HEARTBEAT_EVERY_S, Attempt
from fnet_dist.run.console import mute
from fnet_dist.run.stop import SIGNALS, STOPPED_EXIT_CODES, reason_of_signal
from fnet_dist.run.tail import FileTail
from jobs.launcher.node_spec import NodeSpec

ROOT = Path(__file__).parents[2]
GRACE_S = 3.0  # for the others to leave by themselves after a rank has failed
LOOK_EVERY_S = 0.05
LOG_LINES = 60


@dataclass
class Worker:
    """A rank's process; `ended_by_us` if it was killed only because another one had failed."""

    rank: int
    process: subprocess.Popen[bytes]
    ended_by_us: bool = False


@dataclass
class Workers:
    """The ranks of this node. Signals that reach the launcher are passed on to them, each once."""

    running: list[Worker] = field(default_factory=list)
    asked: str = ""  # name of the last signal that asked for a stop
    asked_at: float = math.inf  # and when the first came, on the monotonic clock

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. Terminals signal the foreground process group: ranks are in groups of their own.

        A second Ctrl-C ends them here: a rank that waits inside a collective could not see it.
        """
        again = number == signal.SIGINT and self.asked == "SIGINT"
        self.asked, self.asked_at = signal.Signals(number).name, min(self.asked_at, time.monotonic())
        for rank in self._alive():
            rank.process.send_signal(signal.SIGKILL if again else number)
            rank.ended_by_us |= again

    @property
    def reason(self) -> str:
        """What outcome.json calls the signal that asked for a stop, or "" while none did."""
        return reason_of_signal(signal.Signals[self.asked]).name if self.asked else ""

    @property
    def exit_code(self) -> int:
        """The exit code of a stop that was asked for."""
        return reason_of_signal(signal.Signals[self.asked]).exit_code

    def start(
        self, attempt: Attempt, config: Config, node_spec: NodeSpec, meeting: Mapping[str, str], listen_fd: int | None
    ) -> None:
        """Start this node's ranks of `attempt`; `config` is as this node reads it, `meeting` where all of them meet.

        Signals are blocked meanwhile, and in a rank until it has its handlers: none is lost, and none kills it.
        """
        blocked = {*SIGNALS, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            for local_rank in range(node_spec.sizes.nproc_per_node):
                rank = node_spec.sizes.node_rank * node_spec.sizes.nproc_per_node + local_rank
                attempt.error(rank).unlink(missing_ok=True)
                with attempt.log(rank).open("ab") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "fnet_dist.train", "--config", str(attempt.run.config)],
                        cwd=ROOT,
                        env=_environment(attempt, config, node_spec, rank, local_rank, meeting, listen_fd),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        process_group=0,
                        pass_fds=() if listen_fd is None or rank else (listen_fd,),
                    )
                self.running.append(Worker(rank, process))
                if self.asked:  # before there was a rank to ask
                    process.send_signal(signal.Signals[self.asked])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def watch(self, each_look: Callable[[], None], is_over: Callable[[], bool]) -> list[Worker]:
        """Wait for the end of all ranks. Once one has failed, or all `is_over`, the others have GRACE_S to leave."""
        deadline, said, next_look = None, "", 0.0
        while self._alive():
            each_look()
            if self.asked and not said:
                said = self.asked
                say(f"{said}: saving and stopping; Ctrl-C twice ends at once, without saving")
            failed = any(rank.process.returncode not in (None, 0, *STOPPED_EXIT_CODES) for rank in self.running)
            over = False
            if deadline is None and time.monotonic() >= next_look:  # of every node, at a disk that all share
                over, next_look = is_over(), time.monotonic() + HEARTBEAT_EVERY_S
            if deadline is None and (failed or over):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(LOOK_EVERY_S)
        each_look()
        ended, self.running = self.running, []
        return ended

    def kill(self) -> None:
        """End what still runs."""
        for rank in self._alive():
            rank.ended_by_us = True
            rank.process.kill()

    def _alive(self) -> list[Worker]:
        """The ranks that still run. Each is asked: the end of one must not go unseen while another runs."""
        return [rank for rank in self.running if rank.process.poll() is None]


class Follower(FileTail):
    """Print what is appended to a rank's log."""

    @property
    def is_empty(self) -> bool:
        """True until rank 0 prints, which it does when all ranks have met, before the first step."""
        return self.offset == 0

    def show(self) -> None:
        """Print what was appended since the last call, an unfinished line too."""
        if new := b"".join(self.read_lines(partial=True)):
            say(new.decode(errors="replace"), end="")


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print on `stream` (standard output if None). A reader that has gone (`| head`) ends the output, not the run."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        mute(stream)


def chosen_interface() -> str | None:
    """The network interface that was chosen for meeting, as gloo's own variable names it."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def last_lines(log: Path) -> str:
    """The end of a rank's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _environment(
    attempt: Attempt,
    config: Config,
    node_spec: NodeSpec,
    rank: int,
    local_rank: int,
    meeting: Mapping[str, str],
    listen_fd: int | None,
) -> dict[str, str]:
    sizes = node_spec.sizes
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TORCHELASTIC_") and name not in ENVIRONMENT
    }
    if sizes.nproc_per_node > 1:
        given.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
    own: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "GROUP_RANK": sizes.node_rank,
        "WORLD_SIZE": sizes.world_size,
        "LOCAL_WORLD_SIZE": sizes.nproc_per_node,
        "TORCHELASTIC_ERROR_FILE": attempt.error(rank),
        "FNET_ATTEMPT": attempt.number,
        "FNET_LAUNCHER": os.getpid(),
        "PYTHONUNBUFFERED": 1,
    }
    if listen_fd is not None and rank == 0:
        own["FNET_LISTEN_FD"] = listen_fd
    if node_spec.deadline is not None:
        own["FNET_DEADLINE"] = min(node_spec.deadline, float(given.get("FNET_DEADLINE") or math.inf))
    # The environment stands above config.json in a rank too: it must not undo what the command line said here.
    return {**given, **environment_of(config), **{name: str(value) for name, value in own.items()}, **meeting}
