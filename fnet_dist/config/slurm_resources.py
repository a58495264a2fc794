"""Size and limits of a Slurm job. The site's own settings (partition, account) are in slurm/site.toml."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator

from fnet_dist.config.fields import LARGEST, NonNegativeInt, OperationalSection, PositiveInt, setting

USUAL_SIGNAL_S = 120


def limit_s(text: str) -> int:
    """Return a time limit in seconds. Raise ValueError if `text` has none of the forms of sbatch(1)."""
    total = 0
    if match := re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,6}))?(?::(\d{1,6}))?", text, re.ASCII):
        days = int(match[1] or 0)
        parts = [int(part) for part in match.groups()[1:] if part is not None]
        # Without days, one or two numbers begin with minutes; with days, with hours.
        hours, minutes, seconds = (*([] if match[1] or len(parts) == 3 else [0]), *parts, 0, 0)[:3]
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= LARGEST:
        raise ValueError("expected a time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S")
    return total


def _check_limit(text: str) -> str:
    limit_s(text)
    return text


# TOML's `time = 30` is an integer: minutes, as in sbatch.
TimeLimit = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(_check_limit)
]


class ResourcesConfig(OperationalSection):
    """The resources that a Slurm job requests."""

    nodes: PositiveInt = setting("number of nodes", 1)
    gpus_per_node: NonNegativeInt = setting("GPUs per node", 0)
    nproc_per_node: PositiveInt | None = setting("ranks per node; none: one per GPU, or one without GPUs", None)
    cpus_per_rank: PositiveInt = setting("CPUs and threads per rank", 1)
    mem_gb: float | None = setting("memory per node in GB; none: the cluster's default", None, ge=0.01, le=1e6)
    time: TimeLimit = setting("time limit of one allocation, as in sbatch --time", "1:00:00")
    signal_s: int | None = setting(
        "seconds before the time limit at which a run saves a checkpoint and asks to be requeued; none: 120, or a "
        "quarter of a shorter limit",
        None,
        ge=1,
        le=65535,
    )
    max_requeues: NonNegativeInt = setting("most requeues of one job", 10)
    max_node_failures: PositiveInt | None = setting(
        "failed attempts on one node after which the job is requeued without that node; none: never", 2
    )

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks per node."""
        return self.nproc_per_node or self.gpus_per_node or 1

    def side_by_side(self, runs: int) -> Self:
        """Return the resources of a job whose node has room for so many of these."""
        update = {
            "gpus_per_node": runs * self.gpus_per_node,
            "nproc_per_node": runs * self.ranks_per_node,
            "mem_gb": None if self.mem_gb is None else runs * self.mem_gb,
        }
        return self.model_copy(update=update) if runs > 1 else self

    @property
    def warning_s(self) -> int:
        """Seconds before the time limit at which Slurm is to warn the run."""
        return self.signal_s or max(1, min(USUAL_SIGNAL_S, limit_s(self.time) // 4))

    @property
    def note(self) -> str | None:
        """A line about a warning that is shorter than usual, since the time limit is; else None."""
        if self.warning_s >= USUAL_SIGNAL_S or self.signal_s is not None:
            return None
        return f"Slurm warns {self.warning_s} s before the limit, and one step and one save must fit in that (signal_s)"

    def conflict(self, config: Any) -> str | None:
        """Refuse a time limit that leaves no time to train: Slurm may send the signal up to a minute early."""
        if self.signal_s is not None and limit_s(self.time) < 4 * self.signal_s:
            return (
                f"resources.time (-t) {self.time} is {limit_s(self.time):,} s, less than 4 x resources.signal_s "
                f"({self.signal_s} s); fix: -t {-(-4 * self.signal_s // 60)}, or a smaller --resources.signal-s in "
                "which one step and one checkpoint still fit; none takes a quarter of the limit"
            )
        return None
