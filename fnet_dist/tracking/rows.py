"""Build the rows that W&B shows from lines of the metrics log. Does not import wandb.

The rows are a pure function of the metrics log, in its order: any process can send missing rows at any time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fnet_dist.run.attempt_table import Trained, count_window
from fnet_dist.run.metrics_log import GPU_SPREADS, MAX_RANK_CURVES, TIME_SPREADS, is_better, loss_extremes

Row = dict[str, float]
Line = dict[str, Any]


@dataclass
class RowState:
    """The knowledge of a RowBuilder of the lines before the next one; can be written as JSON."""

    train: Line | None = None  # the last one, whose row is not complete yet
    evaluation: Line | None = None  # of its step
    window: Line | None = None
    best: Line | None = None  # the eval line with the best monitored value
    last_evaluation: Line | None = None
    last_epoch: Line | None = None
    extremes: dict[str, float] = field(default_factory=dict)  # the best value of each metric
    row_attempt: int = 0  # that trained the step of the last row
    attempts: Trained = field(default_factory=dict)


class RowBuilder:
    """Returns a row for every `every_steps`-th step, for each evaluated step and for predictions, in order.

    A step's row is complete with the next step's line, or with the epoch line of its step. `state` is that after the
    last line; `directions` are those of manifest.json.
    """

    def __init__(self, every_steps: int, monitor: str = "loss", directions: Mapping[str, str] = {}) -> None:
        self.every_steps = every_steps
        self._monitor, self._directions = monitor, directions
        self.state = RowState()

    def add(self, line: Line) -> Row | None:
        """Take the next line of the metrics log; return the row that it completes, if any."""
        state = self.state
        if line["kind"] == "window":
            state.window = line
            count_window(state.attempts, line)
        elif line["kind"] == "train":
            row, state.train = self.pending_row(), line
            return row
        elif line["kind"] == "eval":
            state.last_evaluation = line
            direction = self._directions.get(self._monitor, "lower")
            if state.best is None or is_better(self.value(line), self.value(state.best), direction):
                state.best = line
            for name, value in line["metrics"].items():
                if is_better(value, state.extremes.get(name), self._directions.get(name, "lower")):
                    state.extremes[name] = value
            if self.pending_step == line["step"]:
                state.evaluation = line
        elif line["kind"] == "epoch":
            state.last_epoch = line
            if state.train is not None and state.train["step"] == line["step"]:
                train, evaluation = state.train, state.evaluation
                state.train = state.evaluation = None
                return self._row(train, evaluation, line)
        elif line["kind"] == "predictions":
            progress = {f"trainer/{key}": line[key] for key in ("step", "epoch", "attempt")}
            return {"_timestamp": line["time"], **progress, "predictions/best_step": line["best_step"]}
        return None

    def pending_row(self) -> Row | None:
        """Return the last step's row as it is, None if it has no row; call it once a step."""
        train, evaluation = self.state.train, self.state.evaluation
        self.state.train = self.state.evaluation = None
        if train is None or (evaluation is None and train["step"] % self.every_steps):
            return None
        return self._row(train, evaluation)

    def _row(self, train: Line, evaluation: Line | None, epoch: Line | None = None) -> Row:
        """Return the row of a train line; the first one of each later attempt is marked."""
        state, row = self.state, build_row(train, self.state.window, evaluation, epoch)
        if state.row_attempt not in (0, train["attempt"]):
            row["trainer/resumed"] = 1
        state.row_attempt = train["attempt"]
        return row

    @property
    def pending_step(self) -> int | None:
        """The last step, while it may still get a row."""
        return None if self.state.train is None else self.state.train["step"]

    @property
    def has_pending_evaluation(self) -> bool:
        """Return True if the last step's evaluation is known."""
        return self.state.evaluation is not None

    def value(self, line: Mapping[str, Any]) -> float | None:
        """Return the monitored value of an eval line."""
        return cast("float | None", line["loss"] if self._monitor == "loss" else line["metrics"].get(self._monitor))


def build_row(
    train: Mapping[str, Any],
    window: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    epoch: Mapping[str, Any] | None = None,
) -> Row:
    """Return the row of a train line, with the last window line before it and its own eval and epoch lines.

    What was not measured has no key: the loss of a rank without a sample, a gradient norm of most steps.
    """
    per_rank = train["loss_per_rank"]
    world_size = len(per_rank) if per_rank is not None else None if window is None else window["world_size"]
    row: dict[str, float | None] = {
        "_timestamp": train["time"],  # without it a row that is sent later would get the time of sending
        **{f"trainer/{key}": train[key] for key in ("step", "epoch", "samples", "attempt")},
        "trainer/world_size": world_size,
        **{f"train/{key}": train[key] for key in ("loss", "lr", "grad_norm")},
        **_losses(train),
    }
    if window is not None:
        row |= {f"perf/{key}": window[key] for key in ("samples_per_second", "step_ms", "max_memory_gib")}
        row |= {f"skew/{key}": window[key] for key in ("slowest_rank", "max_over_median")}
        row |= _spreads(window)
    if evaluation is not None:
        values = {"loss": evaluation["loss"], **evaluation["metrics"]}
        row |= {f"eval/{name}": value for name, value in values.items()}
    if epoch is not None:
        row["train/epoch_loss"] = epoch["train_loss"]
    return {key: value for key, value in row.items() if value is not None}


def _spreads(window: Mapping[str, Any]) -> dict[str, float | None]:
    """Return how far apart the ranks' times and GPUs are: time/data_ms_max, gpu/percent_rank_0, ...

    A rank has a figure of its own up to eight ranks (window_lines.py); an older log has none of these.
    """
    row: dict[str, float | None] = {}
    for key in (*TIME_SPREADS, *GPU_SPREADS):
        if (spread := window.get(key)) is not None:
            name = spread_name(key)
            row |= {f"{name}_{each}": spread[each] for each in ("min", "median", "max", "max_rank")}
            row |= {f"{name}_rank_{rank}": value for rank, value in enumerate(spread["by_rank"] or ())}
    return row


def spread_name(key: str) -> str:
    """Return what the W&B keys of a window's spread begin with: time/data_ms, gpu/percent."""
    return f"time/{key}" if key in TIME_SPREADS else f"gpu/{key.removeprefix('gpu_')}"


def _losses(train: Mapping[str, Any]) -> dict[str, float | None]:
    """Return each rank's loss with their extremes; above MAX_RANK_CURVES ranks the 95th percentile and worst rank."""
    per_rank = train["loss_per_rank"]
    if per_rank is None:  # a job of many ranks records them in full only every log_every_steps
        return {"loss/min": train["loss_min"], "loss/max": train["loss_max"], "loss/worst_rank": train["worst_rank"]}
    lowest, highest, worst_rank = loss_extremes(per_rank)
    row: dict[str, float | None] = {"loss/min": lowest, "loss/max": highest}
    if len(per_rank) <= MAX_RANK_CURVES:
        return row | {f"loss/rank_{rank}": loss for rank, loss in enumerate(per_rank)}
    losses = sorted(loss for loss in per_rank if loss is not None)
    p95 = losses[math.ceil(0.95 * len(losses)) - 1] if losses else None
    return row | {"loss/p95": p95, "loss/worst_rank": worst_rank}
