"""follow(): the rows that are sent of a metrics log that grows, ends early, or belongs to another attempt by now."""

from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, open_run, run_dir_of, write_manifest
from fnet_dist.tracking.wandb_run import Session, follow
from tests.helpers.config import FashionConfig
from tests.helpers.made_run import train_line

EPOCH = 6  # steps


class Rows:
    """Collects rows as a W&B run does."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluated: list[int] = []

    def log(self, row: dict[str, Any]) -> None:
        self.steps.append(row["trainer/step"])
        self.evaluated += [row["trainer/step"]] * ("eval/accuracy" in row)


def end_of_epoch(step: int) -> list[Any]:
    shared = {"epoch": 1, "step": step, "attempt": 1}
    evaluation = {"kind": "eval", **shared, "loss": 1.0, "metrics": {"accuracy": 0.5}}
    return [evaluation, {"kind": "epoch", **shared, "train_loss": 1.0}]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of two epochs of `EPOCH` steps, nothing of it recorded."""
    made = FashionConfig.model_validate({"run": {"name": "r", "root": str(tmp_path), "epochs": 2}})
    run_dir_of(made).path.mkdir()
    run = open_run(made)
    write_manifest(run, {"dataset": {"train_count": 64 * EPOCH}})
    return run


def written(run: RunDir, there: int = 0, ours: int = 100, *later: list[Any]) -> Rows:
    """Return the rows sent to a W&B run that has `there` rows already; ownership is lost after `ours` more.

    The lines of `later` are appended one by one while the metrics log is followed.
    """
    rows, waiting, asked = Rows(), list(later), iter(range(ours))
    taker: Any = rows

    def wait_for_end() -> bool:
        if not waiting:
            return True
        metrics_log.append(run.metrics_log, waiting.pop(0))
        return False

    _, written = follow(run, Session(taker, there), 2, wait_for_end, lambda: next(asked, None) is not None)
    assert written == len(rows.steps)
    return rows


def train(*steps: int) -> list[Any]:
    return [train_line(step, 1) for step in steps]


def test_only_rows_that_w_and_b_lacks_are_sent(run: RunDir) -> None:
    metrics_log.append(run.metrics_log, train(1, 2, 3, 4, 5))
    assert written(run).steps == [2, 4]
    assert written(run, 1).steps == [4]
    assert written(run, 2).steps == []


def test_the_last_step_of_an_epoch_waits_for_its_evaluation_even_by_the_next_attempt(run: RunDir) -> None:
    """An attempt that is stopped during the evaluation leaves it to the next one."""
    metrics_log.append(run.metrics_log, train(*range(1, EPOCH + 1)))
    assert written(run).steps == [2, 4]
    metrics_log.append(run.metrics_log, end_of_epoch(EPOCH))
    rows = written(run, 2)
    assert (rows.steps, rows.evaluated) == ([6], [6])


def test_a_metrics_log_that_grows_gives_the_same_rows(run: RunDir) -> None:
    rows = written(run, 0, 100, train(1, 2), train(3), train(4, 5, 6), end_of_epoch(6), train(7, 8))
    assert (rows.steps, rows.evaluated) == ([2, 4, 6, 8], [6])


def test_after_losing_ownership_no_row_is_sent(run: RunDir) -> None:
    metrics_log.append(run.metrics_log, train(*range(1, 6)))
    assert written(run, 0, 1).steps == [2]
    assert written(run, 0, 0).steps == []
