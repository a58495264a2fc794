"""Observe a short run on a private Slurm from outside: its step, its job's state, its end."""

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

LOOK_EVERY_S = 0.2  # each look starts scontrol


@dataclass(frozen=True)
class SupervisedSlurmRun:
    """A run, and the id of the Slurm job that trains it."""

    run: RunDir
    job_id: str

    def job(self) -> ShownJob:
        """Return the job as Slurm shows it now. Raises SupervisedRunError once Slurm has forgotten it."""
        if (shown := client.show_job(self.job_id)) is None:
            raise SupervisedRunError(f"Slurm does not know job {self.job_id} any more")
        return shown

    def step(self) -> int:
        """Return the last step in the metrics log."""
        return last_steps(self.run.metrics_log)["train"]

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics log has `step`. Raises SupervisedRunError if the job ends."""
        self._wait(lambda: self.step() >= step, f"step {step} of {self.run.name}")

    def wait_for_attempt(self, number: int) -> None:
        """Wait until attempt `number` has begun. Raises SupervisedRunError if the job ends."""
        self._wait(lambda: (last := last_attempt(self.run)) is not None and last.number >= number, f"attempt {number}")

    def wait_for_end(self) -> ShownJob:
        """Wait until the job is over and will not be requeued. Return it."""
        wait_until(lambda: self.job().state in TERMINAL_STATES, f"the end of job {self.job_id}", every_s=LOOK_EVERY_S)
        return self.job()

    def end_of(self, number: int) -> dict[str, Any]:
        """Return end.json of attempt `number`. Raises SupervisedRunError if it wrote none."""
        end: dict[str, Any] | None = read_json(Attempt(self.run, number).end)
        if end is None:
            raise SupervisedRunError(f"attempt {number} of {self.run.name} ended, and recorded no end")
        return end

    def ends(self) -> list[str | None]:
        """Return the `reason` in each attempt's end.json; None for an attempt that wrote none."""
        return [(attempt.read_end() or {}).get("reason") for attempt in list_attempts(self.run)]

    def _wait(self, condition: Callable[[], bool], event: str) -> None:
        def is_true() -> bool:
            if condition():
                return True
            if (state := self.job().state) in TERMINAL_STATES and not condition():
                raise SupervisedRunError(f"job {self.job_id} is {state} before {event}; see {self.run.submitit}")
            return False

        wait_until(is_true, event, every_s=LOOK_EVERY_S)


def preempt(folder: Path, nodes: int) -> None:
    """Preempt what runs on `nodes` nodes, by a short job in the partition `high`. submitit writes to `folder`."""
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    executor.update_parameters(name="above", nodes=nodes, slurm_partition="high", slurm_exclusive=True)
    executor.submit(time.sleep, 0)  # ends at once; the preempted job then starts again
