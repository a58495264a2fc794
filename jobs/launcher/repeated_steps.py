"""Repeat the steps that failed, once: that tells a fault of the machine from one of the data, the settings or the code.

A restart from the last checkpoint does that by itself, with the same bits, on all ranks and nodes of the run.
"""

from dataclasses import dataclass

from fnet_dist.config.schema import Config
from fnet_dist.errors import DesyncError
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.failure import MEANINGS, REPLAYED, AttemptFailure, read_attempt_failure
from fnet_dist.run.log import LOGGER
from jobs.launcher.bad_nodes import was_trained_later


@dataclass
class RepeatedSteps:
    """The failure of an `earlier` attempt, whose steps this one repeats; `verdict` as in end.json."""

    earlier: Attempt
    failure: AttemptFailure
    verdict: str = ""  # "passed": the machine was the cause; "failed again"

    def judge(self, last: AttemptFailure | None = None, *, is_finished: bool = False) -> None:
        """Decide once the step that failed is in a checkpoint, or this attempt has ended with the failure `last`."""
        if self.verdict:
            return
        if is_finished or was_trained_later(self.earlier.run, self.failure, [last]):
            self.verdict = "passed"
            at = "" if self.failure.rank is None else f", on rank {self.failure.rank}"
            node = f" ({self.failure.node})" if self.failure.node else ""
            LOGGER.warning(
                f"step {self.failure.step:,} is trained without an error this time: in attempt {self.earlier.number} "
                f"the machine was the cause{at}{node}, not the data or the settings"
            )
        elif last is not None and last.reason == self.failure.reason:
            is_same = last.reason == DesyncError.reason or last.step == self.failure.step  # see is_repeated
            self.verdict = "failed again" if is_same else ""


def steps_to_repeat(last: Attempt | None, config: Config, job_id: str | None) -> RepeatedSteps | None:
    """Return the failure of the `last` attempt if repeating its steps tells the cause, and say so; else None.

    Only this launcher or this job goes on as it was. Before another start, somebody may have repaired the code.
    """
    if last is None or not config.parallel.replay_on_failure:
        return None
    failure, same_job = read_attempt_failure(last), job_id is not None and last.read_begin()["slurm_job_id"] == job_id
    goes_on = same_job or (last.read_end() or {}).get("restarts")
    if not goes_on or failure is None or failure.reason not in REPLAYED or failure.step is None:
        return None
    LOGGER.info(
        f"repeating the steps up to step {failure.step:,}, at which attempt {last.number} failed. If that step fails "
        f"again: {MEANINGS[failure.reason]}. If not, the machine failed once"
    )
    return RepeatedSteps(last, failure)
