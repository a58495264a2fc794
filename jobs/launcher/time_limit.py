"""When this allocation ends: Slurm's warning signal can get lost, so node 0 watches the clock too."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass

from slurm import client
from slurm.errors import SlurmError


@dataclass
class TimeLimit:
    """The end of an allocation, as Slurm last told it.

    It can move while the job runs: `scontrol update TimeLimit` sets it, and time in which Slurm has suspended the job
    does not count.
    """

    raw_job_id: str
    margin_s: float  # before the end, when it is time to save
    ends: float  # Unix time; infinite if it is unknown, or if it has been acted on

    def has_come(self) -> bool:
        """Return True once, `margin_s` before the end. Slurm is asked again first; without an answer, what it said last
        counts."""
        if time.time() < self.ends - self.margin_s:
            return False
        with suppress(SlurmError):
            self.ends = read_end(self.raw_job_id)
            if time.time() < self.ends - self.margin_s:
                return False
        self.ends = math.inf
        return True


def read_end(raw_job_id: str) -> float:
    """Return when the allocation ends, Unix time; infinite without a limit. Raise SlurmError if Slurm does not say."""
    shown = client.show_job(raw_job_id)
    return math.inf if shown is None or shown.ends is None else shown.ends
