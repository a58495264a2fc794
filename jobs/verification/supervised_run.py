"""A short run under `jobs run` that somebody watches from outside: its processes, its ledger, its end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.processes import children, is_running, python_environment
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt, last_attempt
from fnet_dist.run.run_dir import RunDir

PATIENCE_S = 180.0
LOOK_EVERY_S = 0.03  # most looks read the ledger from its begin


class SupervisedRunError(Exception):
    """Something that was to happen did not; the text says what."""


@dataclass
class SupervisedRun:
    """A run, and the job file and options that start it. What it prints is in `output`."""

    run: RunDir
    job: list[str]
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.run.path.with_name(f"{self.run.name}.out")

    @property
    def _place(self) -> list[str]:
        return ["--run.root", str(self.run.path.parent), "--run.name", self.run.name]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "jobs", "run", *self.job, *self._place],
                env=python_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.launchers.append(launcher)
        return launcher

    def step(self) -> int:
        """The last step on record."""
        return metrics_log.last_steps(self.run.metrics_log)["train"]

    def committed_step(self) -> int:
        """The step of the newest checkpoint, 0 before the first."""
        return next(iter(checkpoint_steps(self.run)), 0)

    def attempt(self) -> Attempt:
        """The attempt that runs now, or the last."""
        attempt = last_attempt(self.run)
        if attempt is None:
            raise SupervisedRunError(f"{self.run.path} has no attempt yet")
        return attempt

    def went_on_from(self) -> int:
        """The step from which the attempt that runs now has gone on, as it said; 0 if it began anew."""
        said = re.search(r"going on from step ([\d,]+)", self.attempt().log(0).read_text())
        return int(said[1].replace(",", "")) if said else 0

    def wait_for_step(self, step: int) -> int:
        """Wait until `step` is on record; the last step that is then."""
        wait_until(lambda: self.step() >= step, f"step {step} of {self.run.name}", self.launchers[-1])
        return self.step()

    def end(self, launcher: subprocess.Popen[bytes], *codes: int) -> None:
        """Wait for `launcher`, which has to end with one of `codes`."""
        try:
            found = launcher.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SupervisedRunError(f"{self.run.name} did not end within {PATIENCE_S:g} s") from None
        if found not in codes:
            raise SupervisedRunError(f"exit code {found}, expected {' or '.join(map(str, codes))}; see {self.output}")

    def clear(self) -> None:
        """Kill what is left of it."""
        for launcher in self.launchers:
            for pid in [*children(launcher.pid), launcher.pid]:
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()


@contextmanager
def supervised(trial: SupervisedRun) -> Iterator[SupervisedRun]:
    """`trial`, of which nothing runs on when the block is left."""
    try:
        yield trial
    finally:
        trial.clear()


def wait_until(
    happened: Callable[[], bool],
    what: str,
    launcher: subprocess.Popen[bytes] | None = None,
    every_s: float = LOOK_EVERY_S,
) -> float:
    """Wait for something; how long it took in seconds. Raises TrialError if it cannot happen any more."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > PATIENCE_S:
            raise SupervisedRunError(f"waited {PATIENCE_S:g} s in vain for {what}")
        if launcher is not None and launcher.poll() is not None and not happened():
            raise SupervisedRunError(f"the run ended with exit code {launcher.returncode} before {what}")
        time.sleep(every_s)
    return time.monotonic() - began


def ranks_of(launcher: int) -> dict[int, int]:
    """The process id of each rank that the process `launcher` has started."""
    found = dict[int, int]()
    for pid in children(launcher):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(text[5:]): pid for text in variables if text.startswith(b"RANK=")}
    return found


def run_undisturbed(folder: Path, job: list[str]) -> RunDir:
    """The run that all others are compared with."""
    with supervised(SupervisedRun(RunDir(folder / "undisturbed"), job)) as trial:
        trial.end(trial.start(), 0)
    return trial.run


@contextmanager
def interrupted_by_term() -> Iterator[None]:
    """Inside, SIGTERM ends as Ctrl-C does: what was started is taken down."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
