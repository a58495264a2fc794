"""Tabulate the attempts of a run: when and where each ran, why it ended, and how far and fast it trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.run_dir import RunDir

MAX_ATTEMPTS = 50  # the newest, of a run that was requeued more often

Trained = dict[str, dict[str, float]]  # attempt -> first_step, last_step, samples and seconds of its windows


class AttemptRow(NamedTuple):
    """One attempt; None for what is not known. Times are Unix time in seconds."""

    number: int
    began: float | None
    ended: float | None
    reason: str
    nodes: str | None  # as Slurm writes them, or the host
    ranks: int | None
    first_step: int | None
    last_step: int | None
    samples_per_second: float | None


def count_window(trained: Trained, window: Mapping[str, Any]) -> None:
    """Add a window line of the metrics log to what its attempt has trained."""
    start = {"first_step": window["first_step"], "samples": 0.0, "seconds": 0.0}
    count = trained.setdefault(str(window["attempt"]), start)
    seconds = window["step_ms"] * (window["last_step"] - window["first_step"] + 1) / 1000
    count["last_step"] = window["last_step"]
    count["samples"] += window["samples_per_second"] * seconds
    count["seconds"] += seconds


def tabulate_attempts(run: RunDir, trained: Trained, reason: str) -> list[AttemptRow]:
    """Return a row for each attempt; `reason` is that of the last one while it has not written its end."""
    rows = []
    attempts = list_attempts(run)[-MAX_ATTEMPTS:]
    for attempt in attempts:
        begin, end, steps = attempt.read_begin(), attempt.read_end(), trained.get(str(attempt.number), {})
        ended_as = reason if attempt == attempts[-1] else "killed"
        first, last, seconds = steps.get("first_step"), steps.get("last_step"), steps.get("seconds")
        rows.append(
            AttemptRow(
                number=attempt.number,
                began=begin.get("time"),
                ended=None if end is None else end["time"],
                reason=ended_as if end is None else end["reason"],
                nodes=begin.get("nodes") or begin.get("host"),
                ranks=begin.get("world_size"),
                first_step=None if first is None else int(first),
                last_step=None if last is None else int(last),
                samples_per_second=steps["samples"] / seconds if seconds else None,
            )
        )
    return rows
