"""Build the rows that W&B shows from lines of the metrics log. Does not import wandb.

The rows are a pure function of the metrics log, in its order: any process can send missing rows at any time.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from fnet_dist.run.metrics_log import MAX_RANK_CURVES, loss_extremes

Row = dict[str, float]


class RowBuilder:
    """Returns a row for every `every_steps`-th step and for each evaluated step, in order.

    A step's row is complete with the next step's line, or with the epoch line that holds its evaluation.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._train = self._window = self.best = self.last_epoch = cast("dict[str, Any] | None", None)

    def add(self, line: dict[str, Any]) -> Row | None:
        """Take the next line of the metrics log; return the row that it completes, if any."""
        if line["kind"] == "window":
            self._window = line
        elif line["kind"] == "train":
            row, self._train = self.pending_row(), line
            return row
        elif line["kind"] == "epoch":
            self.last_epoch = line
            if self.best is None or line["test_accuracy"] > self.best["test_accuracy"]:
                self.best = line
            if self._train is not None and self._train["step"] == line["step"]:
                train, self._train = self._train, None
                return build_row(train, self._window, line)
        return None

    def pending_row(self) -> Row | None:
        """Return the last step's row as one without an evaluation, None if it has no row; call it once a step."""
        train, self._train = self._train, None
        return build_row(train, self._window) if train is not None and train["step"] % self.every_steps == 0 else None

    @property
    def pending_step(self) -> int | None:
        """The last step, while it may still get a row."""
        return None if self._train is None else self._train["step"]


def build_row(
    train: Mapping[str, Any], window: Mapping[str, Any] | None = None, epoch: Mapping[str, Any] | None = None
) -> Row:
    """Return the row of a train line, with the last window line before it and its own epoch line.

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
    if epoch is not None:
        row |= {"eval/loss": epoch["test_loss"], "eval/accuracy": epoch["test_accuracy"]}
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
