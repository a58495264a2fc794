"""The settings of a Slurm job: sizes and limits. What belongs to a site (partition, account) is in slurm/site.toml."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from fnet_dist.config.fields import LARGEST, NonNegativeInt, PositiveInt, Section, setting


def limit_s(text: str) -> int:
    """A time limit in seconds, in each form of sbatch(1): M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Else ValueError."""
    total = 0
    if match := re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,6}))?(?::(\d{1,6}))?", text, re.ASCII):
        days = int(match[1] or 0)
        parts = [int(part) for part in match.groups()[1:] if part is not None]
        hours, minutes, seconds = (*([] if match[1] or len(parts) == 3 else [0]), *parts, 0, 0)[:3]
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= LARGEST:
        raise ValueError("expected a time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S")
    return total


def _check_limit(text: str) -> str:
    limit_s(text)
    return text


TimeLimit = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(_check_limit)
]


class ResourcesConfig(Section):
    """What a Slurm job asks for."""

    nodes: PositiveInt = setting("nodes", 1, changes_result=False)
    gpus_per_node: NonNegativeInt = setting("GPUs on each node", 0, changes_result=False)
    nproc_per_node: PositiveInt | None = setting(
        "ranks on each node; none: one for each GPU, or one", None, changes_result=False
    )
    cpus_per_rank: PositiveInt = setting("CPUs of each rank, and its threads", 1, changes_result=False)
    mem_gb: float | None = setting(
        "memory of each node in GB; none: the cluster's default", None, changes_result=False, ge=0.01, le=1e6
    )
    time: TimeLimit = setting("time limit of one allocation, as for sbatch", "1:00:00", changes_result=False)
    signal_s: int = setting(
        "seconds before the time limit at which a run saves and asks to go on in another allocation",
        120,
        changes_result=False,
        ge=1,
        le=65535,
    )
    max_requeues: NonNegativeInt = setting("allocations after the first, for one job", 10, changes_result=False)

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.nproc_per_node or self.gpus_per_node or 1

    def conflict(self, config: Any) -> str | None:
        """A step and a save must fit between warning and end, and Slurm may warn a minute early."""
        if limit_s(self.time) < 4 * self.signal_s:
            return (
                f"resources.time {self.time} is {limit_s(self.time):,} s, less than 4 x resources.signal_s "
                f"({self.signal_s} s before the end a run saves); fix: --resources.time "
                f"{-(-4 * self.signal_s // 60)}, or a smaller --resources.signal-s that holds one step and one save"
            )
        return None
