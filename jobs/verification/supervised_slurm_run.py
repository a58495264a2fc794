"""A short run on a private Slurm that somebody watches from outside: how far it is, how its job stands, its end."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from fnet_dist.run.attempt import Attempt, last_attempt, list_attempts
from fnet_dist.run.metrics_log import last_steps
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.supervised_run import SupervisedRunError, wait_until
from slurm import client
from slurm.types import TERMINAL_STATES, ShownJob

LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class SupervisedSlurmRun:
    """A run, and the Slurm job that trains it."""

    run: RunDir
    job_id: str

    def job(self) -> ShownJob:
        """The job as Slurm shows it now. Raises TrialError once Slurm has forgotten it."""
        shown = client.show_job(self.job_id)
        if shown is None:
            raise SupervisedRunError(f"Slurm does not know job {self.job_id} any more")
        return shown

    def step(self) -> int:
        """The last step on record."""
        return last_steps(self.run.metrics_log)["train"]

    def wait_for_step(self, step: int) -> int:
        """Wait until `step` is on record; the last step that is then. Raises TrialError if the job ends before."""
        self._wait(lambda: self.step() >= step, f"step {step} of {self.run.name}")
        return self.step()

    def wait_for_attempt(self, number: int) -> None:
        """Wait until attempt `number` has begun."""
        self._wait(lambda: (last := last_attempt(self.run)) is not None and last.number >= number, f"attempt {number}")

    def wait_for_end(self) -> ShownJob:
        """Wait until the job is over for good; how it ended."""
        wait_until(lambda: self.job().state in TERMINAL_STATES, f"the end of job {self.job_id}", every_s=LOOK_EVERY_S)
        return self.job()

    def end_of(self, number: int) -> dict[str, Any]:
        """end.json of attempt `number`. Raises TrialError if it ended without a word."""
        end: dict[str, Any] | None = read_json(Attempt(self.run, number).end)
        if end is None:
            raise SupervisedRunError(f"attempt {number} of {self.run.name} ended without a word")
        return end

    def ends(self) -> list[str | None]:
        """Why each attempt ended, in its own words; None for one that ended without any."""
        return [(read_json(attempt.end) or {}).get("reason") for attempt in list_attempts(self.run)]

    def _wait(self, happened: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            if happened():
                return True
            if (state := self.job().state) in TERMINAL_STATES and not happened():
                raise SupervisedRunError(f"job {self.job_id} is {state} before {what}; see {self.run.submitit}")
            return False

        wait_until(look, what, every_s=LOOK_EVERY_S)


def preempt(folder: Path, nodes: int) -> None:
    """Let a job of the partition above take all `nodes` nodes for a moment. submitit's files go to `folder`."""
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    executor.update_parameters(name="above", nodes=nodes, slurm_partition="high", slurm_exclusive=True)
    executor.submit(time.sleep, 0)
