"""Make the summary of a run in W&B: how it ended, its best and final figures, and its attempts. Imports no wandb."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from fnet_dist.run.attempt_table import AttemptRow, tabulate_attempts
from fnet_dist.tracking.row_reader import RowReader, metric_directions

_OF_A_RANK = re.compile(r".*(?:/|_)rank_(\d+)")


def make_summary(rows: RowReader, status: str, reason: str) -> dict[str, Any]:
    """Return the summary of what `rows` has read of the metrics log, ended as `status` and `reason` of outcome.json."""
    state = rows.builder.state
    best, last, epoch = state.best, state.last_evaluation, state.last_epoch
    summary: dict[str, Any] = {"outcome/status": status, "outcome/reason": reason}
    attempts = tabulate_attempts(rows.run, state.attempts, reason or status)
    summary["attempts"] = {str(row.number): _attempt(row) for row in attempts}
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


def _attempt(row: AttemptRow) -> dict[str, Any]:
    return row._asdict() | {"began": _moment(row.began), "ended": _moment(row.ended)}


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
