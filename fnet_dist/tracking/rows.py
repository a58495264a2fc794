"""From ledger lines to the rows that W&B shows: which steps have one, and what is in it. No wandb here.

The same ledger always gives the same rows, whoever reads it and when: what W&B lacks can be written at any time.
"""

import math
from collections.abc import Mapping
from typing import Any

from fnet_dist.run.metrics_log import MAX_RANK_CURVES, loss_extremes

Row = dict[str, float]


class RowBuilder:
    """Gives a row for each step on the grid of `every_steps` and for each step that was evaluated, in their order.

    A step's row waits for the next step's line or for its epoch's, whose evaluation it carries.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._train: dict[str, Any] | None = None
        self._window: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.last_epoch: dict[str, Any] | None = None

    def add(self, line: dict[str, Any]) -> Row | None:
        """Take the ledger's next line, and give the row that is complete by it."""
        if line["kind"] == "window":
            self._window = line
        elif line["kind"] == "train":
            row, self._train = self.rest(), line
            return row
        elif line["kind"] == "epoch":
            self.last_epoch = line
            if self.best is None or line["test_accuracy"] > self.best["test_accuracy"]:
                self.best = line
            if self._train is not None and self._train["step"] == line["step"]:
                train, self._train = self._train, None
                return row_of(train, self._window, line)
        return None

    def rest(self) -> Row | None:
        """The row of the last step, if it has one and no evaluation of it is to come."""
        train, self._train = self._train, None
        on_grid = train is not None and train["step"] % self.every_steps == 0
        return row_of(train, self._window) if train is not None and on_grid else None

    @property
    def waiting_step(self) -> int | None:
        """The last step, while its row could still come."""
        return None if self._train is None else self._train["step"]


def row_of(
    train: Mapping[str, Any], window: Mapping[str, Any] | None = None, epoch: Mapping[str, Any] | None = None
) -> Row:
    """The row of a train line, with what the newest window line before it and its own epoch line say.

    What was not measured has no key: a rank without a sample in that step, a gradient norm between its steps.
    """
    per_rank = train["loss_per_rank"]
    row: dict[str, float | None] = {
        "_timestamp": train["time"],  # or rows that are sent later would all be of that moment
        "trainer/step": train["step"],
        "trainer/epoch": train["epoch"],
        "trainer/samples": train["samples"],
        "trainer/attempt": train["attempt"],
        "trainer/world_size": _world_size(per_rank, window),
        "train/loss": train["loss"],
        "train/lr": train["lr"],
        "train/grad_norm": train["grad_norm"],
        **_losses(train),
    }
    if window is not None:
        row |= {
            "perf/samples_per_second": window["samples_per_second"],
            "perf/step_ms": window["step_ms"],
            "perf/max_memory_gib": window["max_memory_gib"],
            "skew/slowest_rank": window["slowest_rank"],
            "skew/max_over_median": window["max_over_median"],
        }
    if epoch is not None:
        row |= {"eval/loss": epoch["test_loss"], "eval/accuracy": epoch["test_accuracy"]}
        row["train/epoch_loss"] = epoch["train_loss"]
    return {key: value for key, value in row.items() if value is not None}


def _world_size(per_rank: list[float | None] | None, window: Mapping[str, Any] | None) -> int | None:
    if per_rank is not None:
        return len(per_rank)
    return None if window is None else int(window["world_size"])


def _losses(train: Mapping[str, Any]) -> dict[str, float | None]:
    """Each rank's loss, or of many ranks the highest twentieth and the rank where it is worst."""
    per_rank = train["loss_per_rank"]
    if per_rank is None:
        return {"loss/min": train["loss_min"], "loss/max": train["loss_max"], "loss/worst_rank": train["worst_rank"]}
    there = {rank: loss for rank, loss in enumerate(per_rank) if loss is not None}
    if not there:
        return {}
    losses = sorted(there.values())
    found: dict[str, float | None] = {"loss/min": losses[0], "loss/max": losses[-1]}
    if len(per_rank) <= MAX_RANK_CURVES:
        return found | {f"loss/rank_{rank}": loss for rank, loss in there.items()}
    worst_rank = loss_extremes(per_rank)[2]
    return found | {"loss/p95": losses[math.ceil(0.95 * len(losses)) - 1], "loss/worst_rank": worst_rank}
