"""A committed run of two ranks on synthetic data, which every later version must show, evaluate and resume."""

import shutil
from pathlib import Path

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import FORMAT, RunDir, read_json
from jobs.__main__ import main
from jobs.commands.evaluate import evaluate_run
from jobs.verification.compare_runs import gaps
from tests.helpers.processes import start

pytestmark = pytest.mark.usefixtures("measured")


@pytest.fixture
def golden(tmp_path: Path) -> RunDir:
    """Copy the committed run: a test must not change it."""
    return RunDir(Path(shutil.copytree(Path(__file__).parent / "run", tmp_path / "golden")))


def test_the_metrics_log_has_every_step_once(golden: RunDir) -> None:
    lines = list(metrics_log.read(golden.metrics_log))
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert all(len(line["loss_per_rank"]) == 2 for line in steps)
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2]
    assert read_json(golden.manifest)["format"] == FORMAT


def test_report_shows_the_golden_run(golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    assert main(["report", str(golden.path)]) == 0
    page = (golden.report / "index.html").read_text(encoding="utf-8")
    outcome = read_outcome(golden)
    assert outcome is not None
    assert f"{100 * (outcome['test_accuracy'] or 0):.2f} %" in page
    assert "synthetic data, not Fashion-MNIST" in page


def test_evaluate_reproduces_the_recorded_accuracy(golden: RunDir) -> None:
    result = evaluate_run(golden)
    last = [line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "epoch"][-1]
    assert (result.correct, result.count) == (last["test_correct"], last["test_count"])
    assert result.loss == pytest.approx(last["test_loss"], rel=1e-5)
    assert sum(row.count for row in result.classes) == 10_000


def test_the_checkpoint_is_valid(golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(repository)
    assert main(["verify", str(golden.path)]) == 0
    assert "1 of 1 checkpoints are good; a start goes on from step 60" in capsys.readouterr().out


def test_more_epochs_resume_the_golden_run(golden: RunDir) -> None:
    job = [str(golden.config), "--run.root", str(golden.path.parent), "--run.name", golden.name, "--run.epochs", "3"]
    with start("-m", "jobs", "run", *job, "--nproc-per-node", "2") as launcher:
        ended = launcher.end(120)
    assert ended.code == 0, ended.err
    assert "going on from step 60 (epoch 2)" in ended.out
    lines = [line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "train"]
    assert ([line["step"] for line in lines], gaps(golden)) == (list(range(1, 91)), [])
    assert {line["attempt"] for line in lines[60:]} == {2}
    outcome = read_outcome(golden)
    assert outcome is not None
    assert (outcome["status"], outcome["step"], outcome["epoch"]) == ("finished", 90, 3)
    assert (outcome["test_accuracy"] or 0) > 0.7
