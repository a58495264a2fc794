"""A run's standing as JSON: keys that stay, null where nothing is known."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs.monitor.attempts import AttemptSummary
from jobs.monitor.run_state import Status


def values_of(status: Status, path: str, past: Sequence[AttemptSummary]) -> dict[str, Any]:
    """The values of one run; times are Unix seconds.

    run, directory; state (running, queued, requeued, submitted, starting, resuming, stopping, ending, restarting,
    silent, suspended, finished, stopped, failed, cancelled, timeout, node failure, gone, unreadable, or another of
    Slurm's), detail (why: a reason, "not begun"), ended (nobody is at it);
    step, total_steps, epoch, loss (mean over the last window), test_accuracy, samples_per_second, slowest_rank,
    time_left_s (training, at this speed); nodes; stand_in (the data's name, if it is not the real one), note;
    job: null, or id, state and reason in Slurm's words, node_list, submitted, started, expected, ends (null while it
    waits), restarts, told_by (squeue, sacct, or null where Slurm said nothing);
    attempts, the newest first: number, end, detail, message (of the rank that failed first), step,
    began, waited_s, lasted_s, ranks, nodes, job_id, restarts.
    """
    figures, length = status.figures, status.length
    train, window, epoch = figures.train or {}, figures.window or {}, figures.epoch or {}
    return {
        "run": status.name,
        "directory": path,
        "state": status.state.word,
        "detail": status.state.detail.strip("()") or None,
        "ended": status.state.ended,
        "step": train.get("step"),
        "total_steps": None if length is None else length.total_steps,
        "epoch": train.get("epoch"),
        "loss": figures.loss,
        "test_accuracy": epoch.get("test_accuracy"),
        "samples_per_second": window.get("samples_per_second"),
        "slowest_rank": window.get("slowest_rank"),
        "time_left_s": status.left_s,
        "nodes": status.nodes,
        "stand_in": status.is_synthetic or None,
        "note": status.note or None,
        "job": _job(status),
        "attempts": [_attempt(attempt) for attempt in past],
    }


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2))


def _job(status: Status) -> dict[str, Any] | None:
    if status.turn is None:
        return None
    names = ("state", "reason", "node_list", "submitted", "started", "expected", "ends", "restarts", "told_by")
    return {"id": status.turn.job_id} | {name: status.job and getattr(status.job, name) for name in names}


def _attempt(past: AttemptSummary) -> dict[str, Any]:
    values = asdict(past)
    del values["since"]
    return values | {"detail": past.detail.strip("()") or None}
