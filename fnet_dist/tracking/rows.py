"""Build the rows that W&B shows from lines of the metrics log. Does not import wandb.

The rows are a pure function of the metrics log, in its order: any process can send missing rows at any time.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from fnet_dist.run.metrics_log import MAX_RANK_CURVES, is_better, loss_extremes

Row = dict[str, float]


class RowBuilder:
    """Returns a row for every `every_steps`-th step and for each evaluated step, in order.

    A step's row is complete with the next step's line, or with the epoch line of its step. `best` is the eval line with
    the best value of `monitor`, `extremes` the best value of each metric; `directions` are those of manifest.json.
    """

    def __init__(self, every_steps: int, monitor: str = "loss", directions: Mapping[str, str] = {}) -> None:
        self.every_steps = every_steps
        self._monitor, self._directions = monitor, directions
        self.extremes: dict[str, float] = {}
        self._train = self._window = self._evaluation = cast("dict[str, Any] | None", None)
        self.best = self.last_evaluation = self.last_epoch = cast("dict[str, Any] | None", None)

    def add(self, line: dict[str, Any]) -> Row | None:
        """Take the next line of the metrics log; return the row that it completes, if any."""
        if line["kind"] == "window":
            self._window = line
        elif line["kind"] == "train":
            row, self._train = self.pending_row(), line
            return row
        elif line["kind"] == "eval":
            self.last_evaluation = line
            direction = self._directions.get(self._monitor, "lower")
            if self.best is None or is_better(self.value(line), self.value(self.best), direction):
                self.best = line
            for name, value in line["metrics"].items():
                if is_better(value, self.extremes.get(name), self._directions.get(name, "lower")):
                    self.extremes[name] = value
            if self.pending_step == line["step"]:
                self._evaluation = line
        elif line["kind"] == "epoch":
            self.last_epoch = line
            if self._train is not None and self._train["step"] == line["step"]:
                train, evaluation = self._train, self._evaluation
                self._train = self._evaluation = None
                return build_row(train, self._window, evaluation, line)
        return None

    def pending_row(self) -> Row | None:
        """Return the last step's row as it is, None if it has no row; call it once a step."""
        train, evaluation = self._train, self._evaluation
        self._train = self._evaluation = None
        if train is None or (evaluation is None and train["step"] % self.every_steps):
            return None
        return build_row(train, self._window, evaluation)

    @property
    def pending_step(self) -> int | None:
        """The last step, while it may still get a row."""
        return None if self._train is None else self._train["step"]

    @property
    def has_pending_evaluation(self) -> bool:
        """Return True if the last step's evaluation is known."""
        return self._evaluation is not None

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
    if evaluation is not None:
        values = {"loss": evaluation["loss"], **evaluation["metrics"]}
        row |= {f"eval/{name}": value for name, value in values.items()}
    if epoch is not None:
        row["train/epoch_loss"] = epoch["train_loss"]
    return {key: value for key, value in row.items() if value is not None}


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
