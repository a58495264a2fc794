"""Run `fnet run` for a short time and observe it from outside: its processes, its metrics log, its end."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.errors import ConfigError
from fnet_dist.processes import children, is_running, python_environment
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt, last_attempt
from fnet_dist.run.run_dir import RunDir

TIMEOUT_S = 180.0  # long, so that a loaded machine fails no drill
LOOK_EVERY_S = 0.03  # most looks read the whole metrics log
OWN_SETTINGS = ("--run.root", "--run.name", "--checkpoint.resume")  # of supervised runs


class SupervisedRunError(Exception):
    """Something that was expected did not happen; the text says what."""


@dataclass
class SupervisedRun:
    """A run, with the job file and options that start it."""

    run: RunDir
    job: list[str]
    launchers: list[Popen[bytes]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The file that takes what its launchers print."""
        return self.run.path.with_name(f"{self.run.name}.out")

    def start(self) -> Popen[bytes]:
        """Start the run, or resume it, and return its launcher."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        place = ["--run.root", str(self.run.path.parent), "--run.name", self.run.name]
        command = [sys.executable, "-m", "jobs", "run", *self.job, *place]  # `place` last: it overrides the job
        env = {**python_environment(), "FNET_NOTIFY": ""}  # nobody is to get a mail about a drill
        with self.output.open("ab") as output:  # a resumed run appends
            # A session of its own: a Ctrl-C in the terminal must not reach it.
            launcher = Popen(command, env=env, stdin=DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self.launchers.append(launcher)
        return launcher

    def step(self) -> int:
        """Return the last step in the metrics log."""
        return metrics_log.last_steps(self.run.metrics_log)["train"]

    def committed_step(self) -> int:
        """Return the step of the newest checkpoint, 0 before the first."""
        return next(iter(checkpoint_steps(self.run)), 0)

    def attempt(self) -> Attempt:
        """Return the newest attempt. Raises SupervisedRunError before the first."""
        if (attempt := last_attempt(self.run)) is None:
            raise SupervisedRunError(f"{self.run.path} has no attempt yet")
        return attempt

    def resumed_step(self) -> int:
        """Return the step from which the newest attempt resumed, as its log says; 0 if it started from scratch."""
        resumed = re.search(r"going on from step ([\d,]+)", text_of(self.attempt().log(0)))
        return int(resumed[1].replace(",", "")) if resumed else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics log has `step`."""
        wait_until(lambda: self.step() >= step, f"step {step} of {self.run.name}", self.launchers[-1])

    def end(self, launcher: Popen[bytes], *codes: int) -> None:
        """Wait for `launcher` to end. Raises SupervisedRunError if its exit code is none of `codes`."""
        try:
            code = launcher.wait(TIMEOUT_S)
        except TimeoutExpired:
            raise SupervisedRunError(f"{self.run.name} did not end within {TIMEOUT_S:g} s") from None
        if code not in codes:
            raise SupervisedRunError(f"exit code {code}, expected {' or '.join(map(str, codes))}; see {self.output}")

    def start_until(self, step: int) -> Popen[bytes]:
        """Start the run, wait until the metrics log has `step`, and return the launcher."""
        launcher = self.start()
        self.wait_for_step(step)
        return launcher


def text_of(log: Path) -> str:
    """Return what a log holds; bytes that are not UTF-8 are replaced."""
    return log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def supervised(run: SupervisedRun) -> Iterator[SupervisedRun]:
    """Kill the launchers and ranks of `run` that still run at the end of the block."""
    try:
        yield run
    finally:
        for launcher in run.launchers:
            for pid in [*children(launcher.pid), launcher.pid]:  # ranks first: an orphan would not be found
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()


def wait_until(
    condition: Callable[[], bool], event: str, launcher: Popen[bytes] | None = None, every_s: float = LOOK_EVERY_S
) -> float:
    """Wait until `condition` holds and return the seconds that it took.

    Raises SupervisedRunError, with the name of the `event`, after TIMEOUT_S or once `launcher` has ended.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > TIMEOUT_S:
            raise SupervisedRunError(f"waited {TIMEOUT_S:g} s in vain for {event}")
        # The condition is tested again: it may have become true just before the end.
        if launcher is not None and launcher.poll() is not None and not condition():
            raise SupervisedRunError(f"the run ended with exit code {launcher.returncode} before {event}")
        time.sleep(every_s)
    return time.monotonic() - began


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the process id of each rank that the process `launcher` has started, by rank and in its order.

    A rank that has not named itself yet, in its first half second, is missing.
    """
    found = dict[int, int]()
    for pid in children(launcher):
        with suppress(OSError):  # it has ended
            if name := re.match(r"rank (\d+)/", Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")):
                found[int(name[1])] = pid
    return dict(sorted(found.items()))


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a setting that a drill or a rehearsal sets itself."""
    given = {word.partition("=")[0].replace("_", "-") for word in overrides}
    for name in OWN_SETTINGS:
        if name in given:
            raise ConfigError(f"{name}: these runs have their own, in a directory that is removed; leave it out")


def run_undisturbed(folder: Path, job: list[str]) -> RunDir:
    """Train `job` without a fault, as the reference for comparisons."""
    with supervised(SupervisedRun(RunDir(folder / "undisturbed"), job)) as run:
        run.end(run.start(), 0)
    return run.run
