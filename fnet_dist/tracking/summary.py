"""Make the summary of a run in W&B: how it ended, its best and final figures, and its attempts. Imports no wandb."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.run_dir import RunDir
from fnet_dist.tracking.row_reader import RowReader, metric_directions

MAX_ATTEMPTS = 50  # the newest, of a run that was requeued more often
_OF_A_RANK = re.compile(r".*(?:/|_)rank_(\d+)")


def make_summary(rows: RowReader, status: str, reason: str) -> dict[str, Any]:
    """Return the summary of what `rows` has read of the metrics log, ended as `status` and `reason` of outcome.json."""
    state = rows.builder.state
    best, last, epoch = state.best, state.last_evaluation, state.last_epoch
    summary: dict[str, Any] = {"outcome/status": status, "outcome/reason": reason}
    summary["attempts"] = _attempts(rows.run, state.attempts, reason or status)
    if best is not None and last is not None:
        best_values, values = ({"loss": line["loss"], **line["metrics"]} for line in (best, last))
        summary |= {f"best/{name}": value for name, value in best_values.items()}
        summary |= {"best/step": best["step"], "best/epoch": best["epoch"]}
        for name, direction in metric_directions(rows.run).items():  # the SDK's own is over its attempt only
            if (extreme := state.extremes.get(name)) is not None:
                summary[f"eval/{name}"] = {"max" if direction == "higher" else "min": extreme}
        if status == "finished" and epoch is not None:
            summary |= {f"final/{name}": value for name, value in values.items()}
            summary["final/train_loss"] = epoch["train_loss"]
    return summary


def gone_ranks(keys: Iterable[str], world_size: int) -> list[str]:
    """Return those of `keys` that belong to a rank which a run of `world_size` ranks does not have any more."""
    return [key for key in keys if (found := _OF_A_RANK.fullmatch(key)) and int(found[1]) >= world_size]


def _attempts(run: RunDir, trained: dict[str, dict[str, float]], reason: str) -> dict[str, dict[str, Any]]:
    """Return {attempt: its begin, end, nodes and steps}; `reason` is that of the last attempt while it has no end.json.

    `trained` is RowState.attempts.
    """
    table: dict[str, dict[str, Any]] = {}
    attempts = list_attempts(run)[-MAX_ATTEMPTS:]
    for attempt in attempts:
        begin, end, steps = attempt.read_begin(), attempt.read_end(), trained.get(str(attempt.number), {})
        ended_as = reason if attempt == attempts[-1] else "killed"
        seconds = steps.get("seconds", 0.0)
        table[f"{attempt.number}"] = {
            "began": _moment(begin.get("time")),
            "ended": _moment(None if end is None else end["time"]),
            "reason": ended_as if end is None else end["reason"],
            "nodes": begin.get("nodes") or begin.get("host"),
            "ranks": begin.get("world_size"),
            "first_step": steps.get("first_step"),
            "last_step": steps.get("last_step"),
            "samples_per_second": steps["samples"] / seconds if seconds else None,
        }
    return table


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
