"""A committed run of format 2, two ranks on a recipe's own data: every later version must show, evaluate and resume it.

It was trained with tests/recipes/regression.py, 3 epochs of 11 steps, and evaluated every 9 steps; that of step 18 is
the best.
"""

import json
import shutil
from pathlib import Path

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.__main__ import main
from jobs.commands.evaluate import evaluate_run
from jobs.verification.compare_runs import gaps
from tests.helpers.processes import start

pytestmark = pytest.mark.usefixtures("measured")

METRICS = {"rmse", "mae", "r2", "within_half"}


@pytest.fixture
def golden(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Copy the committed run: a test must not change it."""
    monkeypatch.chdir(repository)  # where its recipe is found
    return RunDir(Path(shutil.copytree(Path(__file__).parent / "format_2", tmp_path / "golden")))


def test_status_and_report_show_its_evaluations(golden: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_json(golden.manifest)["format"] == 2
    assert main(["status", str(golden.path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["state"], values["step"], values["note"], values["monitor"]) == ("finished", 33, None, "within_half")
    assert values["evaluation"]["metrics"].keys() == METRICS
    assert main(["report", str(golden.path)]) == 0
    page = (golden.report / "index.html").read_text(encoding="utf-8")
    assert all(f"test {name}" in page for name in METRICS)


def test_evaluate_reproduces_the_last_and_the_best(golden: RunDir) -> None:
    evaluations = {line["step"]: line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "eval"}
    assert [*evaluations] == [9, 18, 27, 33]
    for best, step in ((False, 33), (True, 18)):
        found, logged = evaluate_run(golden, best=best).evaluation, evaluations[step]
        assert found.count == logged["count"] == 61
        assert {"loss": found.loss, **found.metrics} == pytest.approx(
            {"loss": logged["loss"], **logged["metrics"]}, rel=1e-5
        )


def test_its_checkpoints_are_valid(golden: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(golden.path)]) == 0
    assert "2 of 2 checkpoints are good; a start goes on from step 33" in capsys.readouterr().out


def test_more_epochs_resume_it_and_a_better_evaluation_becomes_the_best(golden: RunDir) -> None:
    settings = ["--run.root", str(golden.path.parent), "--run.name", golden.name, "--run.epochs", "40"]
    settings += ["--run.patience", "none"]
    with start("-m", "jobs", "run", str(golden.config), *settings, "--nproc-per-node", "2") as launcher:
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    assert "going on from step 33 (epoch 3)" in ended.out
    assert gaps(golden) == []
    outcome, best = read_outcome(golden), read_json(golden.best)
    assert outcome is not None
    assert (outcome["status"], outcome["step"], outcome["epoch"]) == ("finished", 440, 40)
    assert best["value"] > 0.49
    evaluations = {line["step"]: line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "eval"}
    assert best["value"] == evaluations[best["step"]]["metrics"]["within_half"]
    assert best["step"] in checkpoint_steps(golden)
    assert 18 not in checkpoint_steps(golden)
