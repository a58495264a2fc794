"""W&B shows the predictions of the last and the best evaluation, once; the real SDK, as in test_worker.py."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fnet_dist.run.notices import read_notices
from fnet_dist.run.run_dir import RunDir, read_manifest
from tests.helpers.tracked_runs import (
    check_rows,
    end,
    in_wandb,
    kill_and_resume,
    one_process,
    read_back,
    sync,
    two_ranks,
)
from tests.helpers.wandb_runs import Run
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.processes

SETTINGS = ("--tracking.log-predictions", "true", "--run.evaluate-every-steps", "20", "--optim.lr", "0.3")


def table(shown: Run, key: str) -> Any:
    """Return the table of the only row that has `key`."""
    [value] = [row[key] for row in shown.history if key in row]
    return json.loads(shown.files[value["path"]])


@pytest.mark.parametrize("mode", [pytest.param("online", marks=pytest.mark.soak), "offline"])
def test_a_chart_and_the_worst_samples_arrive_once(server: WandbServer, tmp_path: Path, mode: str) -> None:
    run = RunDir(tmp_path / "r")
    ended = end(two_ranks(run, mode, *SETTINGS, steps=70), **server.environment())
    assert ended.code == 0, ended.err
    if mode == "offline":
        assert sum("predictions/samples.nrows" in row for row in read_back(run)) == 1
        sync(run, server)
    assert "0 rows sent" in sync(run, server)
    shown = in_wandb(run, server)
    saved = load_file(run.predictions)
    [version] = [files for name, [files] in shown.artifacts.items() if "-predictionssamples-" in name]
    samples = json.loads(version["predictions/samples.table.json"])
    assert samples["columns"] == ["sample", "image", "true", "predicted", "loss"]
    losses = [row[4] for row in samples["data"]]
    assert len(losses) == 40
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(saved["losses"].max())
    sample, image, true, predicted, loss = samples["data"][0]
    assert loss == pytest.approx(saved["losses"][sample])
    names = read_manifest(run)["dataset"]["class_names"]
    assert (true, predicted) == (names[saved["true"][sample]], names[saved["predicted"][sample]])
    assert (image["width"], image["height"]) == (28, 28)
    assert version[image["path"]].startswith(b"\x89PNG")
    counts = table(shown, "predictions/confusion_table")["data"]
    assert sum(row[2] for row in counts) == 10_000
    right = sum(count for actual, predicted, count in counts if actual == predicted)
    assert right == np.sum(saved["true"] == saved["predicted"])
    assert "predictions/confusion" in json.dumps(shown.raw_config["_wandb"])  # the chart's definition
    [row] = [row for row in shown.history if "predictions/samples" in row]
    assert row["trainer/step"] == 70
    assert ("predictions/samples_best" in row) == (row["predictions/best_step"] != 70)

    ended = end(one_process(run, mode, *SETTINGS, steps=90), **server.environment())  # a longer training of it
    assert ended.code == 0, ended.err
    sync(run, server)
    steps = [row["trainer/step"] for row in shown.history if "predictions/samples" in row]
    assert steps == [70, 90]
    check_rows([row for row in shown.history if "predictions/samples" not in row], run)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_with_everything_on_rows_predictions_and_alerts_arrive_once_over_five_kills(
    server: WandbServer, tmp_path: Path, mode: str
) -> None:
    run, seed = RunDir(tmp_path / "r"), random.randrange(10**6)
    kill_and_resume(run, mode, seed, server, *SETTINGS, "--tracking.alerts", "best", synced=mode == "offline")
    sync(run, server)
    shown = in_wandb(run, server)
    assert sum("predictions/samples" in row for row in shown.history) == 1, f"seed {seed}"
    check_rows([row for row in shown.history if "predictions/samples" not in row], run)
    told, sent = [notice["text"] for notice in read_notices(run)], [alert["text"] for alert in shown.alerts]
    counts = [sum(text.startswith(f"{notice} (") for text in sent) for notice in told]
    assert len(told) > 1, f"seed {seed}"
    assert {*counts} <= {0, 1}, f"seed {seed}: {told} {sent}"
    assert sum(counts) == len(sent) >= len(told) - 1, f"seed {seed}"  # a kill between counting and sending loses one
    assert shown.state == "finished"
