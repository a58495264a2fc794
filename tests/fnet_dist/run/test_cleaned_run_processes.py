"""A run whose directory people have cleaned: it goes on, ends bit-identical, and shows what it has trained."""

import shutil
from pathlib import Path

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import RunDir
from jobs.monitor.run_state import read_status
from jobs.verification.compare_runs import gaps
from tests.helpers.processes import JOBS_RUN, start

pytestmark = pytest.mark.processes

SETTINGS = ("--data.dataset", "synthetic", "--parallel.device", "cpu", "--checkpoint.every-steps", "10")


def train_to(step: int, job: Path, *words: str) -> str:
    with start(*JOBS_RUN, str(job), *words, "--run.max-steps", str(step)) as launcher:
        ended = launcher.end(100)
    assert ended.code == 0, ended.err
    return ended.out


def remove_attempts(run: RunDir) -> None:
    for path in (*run.attempts.iterdir(), *run.logs.iterdir()):
        shutil.rmtree(path)


def purge_files(run: RunDir) -> None:
    """As a file system does that removes files nobody has read for a month."""
    for path in run.attempts.rglob("*"):
        if path.is_file():
            path.unlink()
    run.manifest.unlink()
    run.outcome.unlink()


def damage_files(run: RunDir) -> None:
    attempt = last_attempt(run)
    for path in (run.config, run.manifest, run.outcome, attempt.end):
        path.write_bytes(path.read_bytes()[:9])


def test_a_run_that_was_cleaned_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(f'run.root = "{tmp_path}"\n', encoding="utf-8")
    undisturbed = RunDir(tmp_path / "undisturbed")
    train_to(50, job, "--run.name", undisturbed.name, *SETTINGS)
    run = RunDir(tmp_path / "a")
    named = ("--run.name", run.name, *SETTINGS)
    train_to(10, job, *named)
    for step, clean in ((20, remove_attempts), (30, purge_files), (40, damage_files)):
        clean(run)
        assert "going on from step" in train_to(step, job, *named)
        assert last_attempt(run).number == step // 10
        status = read_status(run)
        assert (status.state.word, status.figures.train["step"], status.note) == ("finished", step, "")
    moved = RunDir(run.path.rename(tmp_path / "b"))
    assert "finished: b" in train_to(50, moved.config)
    assert not run.path.exists()
    assert moved.model.read_bytes() == undisturbed.model.read_bytes()
    assert _losses(moved) == _losses(undisturbed)
    assert gaps(moved) == []


def _losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]
