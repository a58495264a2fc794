"""Promise: jobs/baseline.toml trains as the book does, with its losses and at least 86.5 % test accuracy.

The first three epochs in `make test`, all ten in `make soak`.
"""

from pathlib import Path

import pytest

from fnet_dist.run import metrics_log
from tests.helpers.processes import TRAINER, start

pytestmark = pytest.mark.processes

# The training loss that the book prints after each epoch.
BOOK = [0.4978, 0.3851, 0.3498, 0.3278, 0.3098, 0.2980, 0.2871, 0.2798, 0.2717, 0.2596]


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_the_epochs_of_the_baseline_have_the_losses_printed_in_the_book(
    real_data: Path, tmp_path: Path, count: int
) -> None:
    job = ["--config", "jobs/baseline.toml", "--run.root", str(tmp_path), "--run.name", "baseline"]
    job += ["--run.epochs", str(count)]
    with start(*TRAINER, *job, COVERAGE_PROCESS_CONFIG="") as trainer:
        ended = trainer.end(200)
    assert ended.code == 0, ended.err
    epochs = [line for line in metrics_log.read(tmp_path / "baseline" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["train_loss"] for line in epochs] == pytest.approx(BOOK[:count], abs=0.012)
    *_, last = (line for line in metrics_log.read(tmp_path / "baseline" / "metrics.jsonl") if line["kind"] == "eval")
    assert last["metrics"]["accuracy"] >= (0.865 if count == 10 else 0.84)
    printed = [line.split()[2] for line in ended.out.splitlines() if line.startswith("Training loss: ")]
    assert printed == [f"{line['train_loss']:.4f}" for line in epochs]
