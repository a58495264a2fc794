"""A committed run of format 1, two ranks on synthetic data: every later version must show, evaluate and resume it."""

import json
import shutil
from pathlib import Path

import pytest

from fnet_dist.checkpoint.storage import MODEL
from fnet_dist.errors import ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json, write_json
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
    assert read_json(golden.manifest)["format"] == 1


def test_an_epoch_line_of_format_1_is_read_as_an_evaluation_and_an_epoch(golden: RunDir) -> None:
    rows = [json.loads(row) for row in golden.metrics_log.read_text().splitlines()]
    old = [row for row in rows if row["kind"] == "epoch"]
    lines = list(metrics_log.read(golden.metrics_log))
    assert [line["kind"] for line in lines if line["kind"] in ("eval", "epoch")] == ["eval", "epoch"] * 2
    for row, line in zip(old, (line for line in lines if line["kind"] == "eval"), strict=True):
        assert {*line} == {*metrics_log.EvalLine.__annotations__}
        assert (line["loss"], line["metrics"]) == (row["test_loss"], {"accuracy": row["test_accuracy"]})
        assert (line["step"], line["epoch"], line["count"], line["seconds"]) == (
            row["step"],
            row["epoch"],
            10_000,
            None,
        )
    for row, line in zip(old, (line for line in lines if line["kind"] == "epoch"), strict=True):
        assert {*line} == {*metrics_log.EpochLine.__annotations__}
        assert line == {key: row[key] for key in line}


def test_status_shows_the_golden_run(
    golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    assert main(["status", str(golden.path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["state"], values["step"], values["note"], values["monitor"]) == ("finished", 60, None, "accuracy")
    assert (values["evaluation"]["step"], values["evaluation"]["metrics"]) == (60, {"accuracy": 0.6067})


def test_report_shows_the_golden_run(golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    assert main(["report", str(golden.path)]) == 0
    page = (golden.report / "index.html").read_text(encoding="utf-8")
    assert f"<dt>test accuracy</dt><dd>{read_json(golden.outcome)['test_accuracy']:.4f}</dd>" in page
    assert (golden.report / "evaluation.png").stat().st_size > 0
    assert "synthetic data, not Fashion-MNIST" in page


def test_evaluate_reproduces_the_recorded_accuracy(golden: RunDir) -> None:
    result = evaluate_run(golden)
    last = [line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "eval"][-1]
    assert (result.evaluation.metrics, result.evaluation.count) == (last["metrics"], last["count"])
    assert result.evaluation.loss == pytest.approx(last["loss"], rel=1e-5)
    assert sum(row.count for row in result.classes) == 10_000


def test_evaluate_prints_a_row_per_class_and_one_line_of_figures(
    golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    assert main(["evaluate", str(golden.path)]) == 0
    head, *classes, figures = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "precision", "recall", "samples"]
    assert [row.split("  ")[0] for row in classes] == read_json(golden.manifest)["dataset"]["class_names"]
    *_, last = (line for line in metrics_log.read(golden.metrics_log) if line["kind"] == "eval")
    assert figures == (
        f"golden: accuracy 0.6067, loss {last['loss']:.4f}, on synthetic data, not Fashion-MNIST, 10,000 test samples"
    )


def test_the_best_weights_are_evaluated_once_there_are_any(
    golden: RunDir, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"has no best checkpoint; --checkpoint.keep-best true keeps one"):
        evaluate_run(golden, best=True)
    checkpoint = golden.checkpoint(60)
    write_json(golden.best, {"step": 60, "monitor": "accuracy", "value": 0.6067, "checkpoint": checkpoint.name})
    golden.model.unlink()
    assert evaluate_run(golden, best=True).evaluation.metrics == {"accuracy": 0.6067}, "those in the checkpoint"
    shutil.copy(checkpoint / MODEL, golden.best_model)
    shutil.rmtree(checkpoint)
    monkeypatch.chdir(repository)
    assert main(["evaluate", str(golden.path), "--best"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("golden (best): accuracy 0.6067, loss ")


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
    lines = list(metrics_log.read(golden.metrics_log))
    steps = [line for line in lines if line["kind"] == "train"]
    assert ([line["step"] for line in steps], gaps(golden)) == (list(range(1, 91)), [])
    assert {line["attempt"] for line in steps[60:]} == {2}
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [30, 60, 90]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
    assert evaluations[-1]["seconds"] > 0, "the new lines are of today's format"
    outcome = read_outcome(golden)
    assert outcome is not None
    assert (outcome["status"], outcome["step"], outcome["epoch"]) == ("finished", 90, 3)
    assert outcome["metrics"] == {"loss": evaluations[-1]["loss"], **evaluations[-1]["metrics"]}
    assert (outcome["metrics"]["accuracy"] or 0) > 0.7
