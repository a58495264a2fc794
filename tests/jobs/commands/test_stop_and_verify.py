"""`fnet stop` and `fnet verify`: what they say and do, on run directories made without training."""

import shutil
from random import Random

import pytest

from fnet_dist.checkpoint.storage import MODEL
from fnet_dist.run.attempt import claim_attempt, last_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import open_run, read_json, run_dir_of, write_json
from jobs.__main__ import main
from tests.helpers.checkpoint_faults import make_content, save_checkpoint
from tests.helpers.config import FashionConfig


@pytest.fixture
def run(tmp_path, repository, monkeypatch):
    """A run with two good checkpoints, whose one attempt lives."""
    monkeypatch.chdir(repository)
    config = FashionConfig.model_validate({"run": {"name": "r", "root": str(tmp_path)}})
    run = run_dir_of(config)
    claim_attempt(run)
    open_run(config)
    for step in (40, 80):
        save_checkpoint(run, make_content(step, Random(0), read_json(run.manifest)["id"]), 1, lambda: None)
    return run


def test_verify_says_of_each_checkpoint_that_it_is_good(run, capsys):
    assert main(["verify", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step        80  good",
        "step        40  good",
        "r: 2 of 2 checkpoints are good; a start goes on from step 80",
    ]


def test_verify_names_the_damaged_file_and_exits_with_65(run, capsys):
    path = run.checkpoint(80) / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(run.path)]) == 65
    out, err = capsys.readouterr()
    assert f"DAMAGED: {path}: sha256 is" in out.splitlines()[0]
    assert err == "error: r: 1 of 2 checkpoints are good; a start goes on from step 40\n"


def test_stop_asks_the_owner_and_names_it(run, capsys):
    assert main(["stop", str(run.path)]) == 0
    assert run.stop.is_file()
    assert capsys.readouterr().out.startswith("r: asked attempt 1, pid ")


def test_stop_refuses_a_run_that_does_not_run(run, capsys):
    """Left behind, the file would stop the next start."""
    end_attempt(last_attempt(run), "crash", 80, 1)
    assert main(["stop", str(run.path)]) == 2
    assert not run.stop.exists()
    assert "is not running; to stop its next start before the first step: touch " in capsys.readouterr().err


def test_a_run_without_checkpoints_has_none_to_verify(run, capsys):
    shutil.rmtree(run.checkpoints)
    assert main(["verify", str(run.path)]) == 0
    assert capsys.readouterr().out == "r has no checkpoints yet\n"


def test_stop_refuses_a_finished_run(run, capsys):
    write_json(run.outcome, {"status": "finished", "step": 80})
    assert main(["stop", str(run.path)]) == 2
    assert "is finished since step 80" in capsys.readouterr().err
    assert not run.stop.exists()
