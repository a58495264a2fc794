"""Run several runs side by side in one task of a Slurm job, each with its part of the task's GPUs and CPUs.

Each run has a launcher of its own (`run_node`), in a process that this one starts. Signals go to all of them. Where a
launcher would ask Slurm for a requeue, it asks this process, which asks Slurm once all launchers have asked or ended.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from fnet_dist.config.load import read_config
from fnet_dist.distributed.launch_env import LaunchEnv, exit_with_launcher
from fnet_dist.processes import python_environment
from fnet_dist.run.attempt import list_attempts, restore_config
from fnet_dist.run.log import LOGGER, configure_logging
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, node_log
from fnet_dist.run.stop import STOPPED_EXIT_CODES, stop_reason
from jobs.launcher.node import exit_with_slurmstepd, signal_handlers
from jobs.launcher.requeue import ask_slurm, requeue_refusal
from jobs.launcher.workers import LOOK_EVERY_S, Worker, Workers, signals_blocked
from slurm.job_env import Allocation, take_part

_LARGEST_ANSWER = 10_000  # bytes


@dataclass(frozen=True)
class Place:
    """The part of the task that a launcher uses: number `part`, from 0, of `parts` equal ones; and how it asks the
    process `parent`, through the file descriptor `fd`."""

    part: int
    parts: int
    fd: int
    parent: int


@dataclass
class Packed:
    """A run of the task, and its launcher."""

    run: RunDir
    launcher: subprocess.Popen[bytes]
    channel: socket.socket
    request: str = ""  # what it asks of Slurm, a StopReason.slurm

    def look(self) -> bool:
        """Return True if the launcher waits for Slurm or has ended."""
        with suppress(BlockingIOError, ConnectionError):
            self.request = self.request or self.channel.recv(_LARGEST_ANSWER, socket.MSG_DONTWAIT).decode()
        return bool(self.request) or self.launcher.poll() is not None

    @property
    def exit_code(self) -> int:
        """The exit code of the launcher, which has ended, as a shell has it."""
        code = self.launcher.returncode
        return code if code >= 0 else 128 - code


def run_side_by_side(runs: Sequence[RunDir], command: Sequence[str], allocation: Allocation) -> int:
    """Run `command`, with a run's directory and its Place added, for each of `runs`; return the exit code of the task.

    It is 0 if all have finished, else that of a run that failed, before that of one that was stopped. A run for
    which _settled_code has a code is not started.
    """
    workers, packed, codes = Workers(in_job=True), list[Packed](), list[int]()
    configure_logging(f"pack of {len(runs)}")
    with signal_handlers(workers):
        for part, run in enumerate(runs):
            if (code := _settled_code(run, allocation)) is not None:
                codes.append(code)
            else:
                packed.append(_start(run, part, len(runs), command, allocation, workers))
        exit_with_slurmstepd()
        while not all(each.look() for each in packed):
            time.sleep(LOOK_EVERY_S)
        requests = {each.request for each in packed} - {""}
        refusal = None
        if requests:  # a run that a warning has stopped is to go on, even if SIGTERM came first for the others
            refusal = ask_slurm(allocation, workers, "requeue" if "requeue" in requests else "wait")
        for each in packed:
            with each.channel, suppress(OSError):  # it may have been killed meanwhile
                each.channel.send((refusal or "").encode())
        for each in packed:
            each.launcher.wait()
    codes += [each.exit_code for each in packed]
    return max(codes, key=lambda code: (code not in (0, *STOPPED_EXIT_CODES), code != 0))


def _start(
    run: RunDir, part: int, parts: int, command: Sequence[str], allocation: Allocation, workers: Workers
) -> Packed:
    """Start the launcher of `run`. What it prints goes to a file of its own, over all allocations of the job."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = Place(part, parts, theirs.fileno(), os.getpid())
    run.submitit.mkdir(parents=True, exist_ok=True)  # somebody may have removed the run: its launcher says so
    log = node_log(run, allocation.job_id, 0)
    with theirs, signals_blocked(), log.open("ab") as output:  # it has no handlers yet
        process = subprocess.Popen(
            [*command, str(run.path), json.dumps(asdict(place))],
            env=python_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(theirs.fileno(),),
        )
        workers.running.append(Worker(part, process))
        if workers.stop_signal:  # it came before this launcher was there to get it
            process.send_signal(signal.Signals[workers.stop_signal])
    LOGGER.info(f"{run.name} runs as part {part} of {parts}; its launcher prints to {log}")
    return Packed(run, process, ours)


def _settled_code(run: RunDir, allocation: Allocation) -> int | None:
    """Return the exit code of a run that is not to be started here, and say why; None if it is.

    It has ended for good in an earlier allocation of this job, or it has been started outside of the job meanwhile.
    """
    outcome, attempts = read_outcome(run), list_attempts(run)
    begins = [begin for each in attempts if (begin := each.read_begin())["machine"] is not None]  # else it is damaged
    jobs = [begin["slurm_job_id"] for begin in begins]
    if allocation.job_id in jobs and jobs[-1] != allocation.job_id:
        LOGGER.info(f"{run.name} has been started outside of this job meanwhile, and is not started here again")
        return 0 if outcome is not None and outcome["status"] == "finished" else 75
    if outcome is None or jobs[-1:] != [allocation.job_id]:
        return None
    if (end := attempts[-1].read_end()) is None or end["restarts"]:
        return None
    restore_config(run)
    is_refused = requeue_refusal(allocation, run, read_config(run.config)) is not None  # another run has requeued it
    if not is_refused and stop_reason(outcome["reason"]).slurm != "end":
        return None
    LOGGER.info(f"{run.name} has ended before in this job ({outcome['reason']}), and is not started again")
    code: int = outcome["exit_code"]
    return code


def take_place(text: str, allocation: Allocation) -> tuple[Allocation, Callable[[str], str | None]]:
    """Use only this launcher's part of the task, and end with the process that has started it; `text` is its Place.

    Return the part, and what asks that process in place of requeue.ask_slurm.
    """
    place = Place(**json.loads(text))
    exit_with_launcher(LaunchEnv(launcher=place.parent))
    channel = socket.socket(fileno=place.fd)

    def ask(next_in_slurm: str) -> str | None:
        channel.send(next_in_slurm.encode())
        return channel.recv(_LARGEST_ANSWER).decode() or None

    return take_part(allocation, place.part, place.parts), ask
