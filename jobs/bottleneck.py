"""Say in one sentence where the time of a run's steps goes, from the window lines of its metrics log."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fnet_dist.run.metrics_log import TIME_SPREADS

LOST = 0.2  # part of a step that makes a bottleneck
OTHER = 0.4  # part of a step that is not measured, and should not pass for computation


def describe_bottleneck(windows: Sequence[Mapping[str, Any]]) -> str:
    """Return the bottleneck of `windows`, as in "input-bound: 62 % of the step waits for data, worst on rank 3".

    Of each rank's time, this is what a faster input, rank or network would save. "" if no window has times: it is of an
    older version.
    """
    measured = [window for window in windows if window.get("data_ms") and window["step_ms"] > 0]
    if not measured:
        return ""
    newest, several = measured[-1], measured[-1]["world_size"] > 1

    def share(kind: str, of: str) -> float:
        return float(median(window[kind][of] / window["step_ms"] for window in measured))

    ratio = median(window["compute_ms"]["max"] / max(window["compute_ms"]["median"], 1e-9) for window in measured)
    lost = {
        "data": share("data_ms", "max"),
        "slow rank": share("compute_ms", "max") - share("compute_ms", "median"),
        # The last rank in a step waits for nobody: what it needs all the same is the exchange itself.
        "exchange": share("exchange_ms", "min"),
    }
    worst = max(lost, key=lambda kind: lost[kind])
    other = 1 - sum(share(kind, "max") for kind in TIME_SPREADS)  # at least: no rank may have all three
    if other > max(OTHER, lost[worst]):
        why = "the optimizer, or other processes on the cores"
        return f"{_percent(other)} of the step is neither data, computation nor exchange: {why}"
    if lost[worst] < LOST:
        exchanges = f", {_percent(lost['exchange'])} exchanges gradients" if several else ""
        computes, waits = _percent(share("compute_ms", "median")), _percent(lost["data"])
        return f"compute-bound: {computes} of the step computes, {waits} waits for data{exchanges}"
    if worst == "data":
        where = f", worst on rank {newest['data_ms']['max_rank']}" if several else ""
        return f"input-bound: {_percent(lost['data'])} of the step waits for data{where}"
    if worst == "exchange":
        return f"exchange-bound: {_percent(lost['exchange'])} of the step exchanges gradients"
    return f"rank {newest['compute_ms']['max_rank']} computes {ratio:.1f}x the median"


def _percent(part: float) -> str:
    return f"{100 * min(part, 1.0):.0f} %"
