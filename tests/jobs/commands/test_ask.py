"""`fnet ask`: what it refuses, on run directories made without training; and what real ranks answer."""

import threading
from pathlib import Path

import pytest

from fnet_dist.run.ask import read_request
from fnet_dist.run.attempt import claim_attempt, last_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, open_run, read_json, run_dir_of, write_json
from jobs.__main__ import main
from jobs.commands import ask
from tests.helpers.config import FashionConfig
from tests.helpers.processes import JOBS_RUN, REPOSITORY, TRAINER, start, torchrun, wait_until


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose one attempt, of two ranks, lives; `fnet ask` looks for the answer a hundred times a second."""
    monkeypatch.setattr(ask, "LOOK_EVERY_S", 0.01)
    config = FashionConfig.model_validate({"run": {"name": "r", "root": str(tmp_path)}})
    run = run_dir_of(config)
    claim_attempt(run, world_size=2)
    open_run(config)
    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["save", "--rank", "0"], "--rank 0 is for stacks and profile: a checkpoint is of all ranks"),
        (["stacks", "--steps", "5"], "--steps 5 is for profile, not for stacks"),
        (["profile", "--steps", "0"], "--steps 0: expected 1 to 1000"),
        (["stacks", "--rank", "0,2"], "--rank 0,2: the attempt has ranks 0 to 1"),
        (["stacks", "--rank", "x"], "--rank 'x': expected a rank, several as in 0,3, or all"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_one_line(words, message, run, capsys):
    assert main(["ask", str(run.path), *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not run.ask.exists()


def test_a_run_that_does_not_train_is_refused(run, capsys):
    end_attempt(last_attempt(run), "crash", 80, 1)
    assert main(["ask", str(run.path), "save"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {run.path} does not train: failed (crash); only a run that trains answers\n"
    assert not run.ask.exists()


def ended_meanwhile(run: RunDir) -> None:
    """End the attempt as soon as something is asked of it."""
    wait_until(run.ask.exists)
    end_attempt(last_attempt(run), "crash", 80, 1)


def test_an_attempt_that_ends_before_it_answers_is_an_error_and_the_request_is_removed(run, capsys):
    thread = threading.Thread(target=ended_meanwhile, args=[run])
    thread.start()
    assert main(["ask", str(run.path), "save"]) == 1
    thread.join()
    assert capsys.readouterr().err == "error: attempt 1 of r ended before it answered\n"
    assert [path.name for path in run.path.iterdir() if "ASK" in path.name] == []


def answered_meanwhile(run: RunDir, answer: dict | None) -> None:
    """Answer as rank 0 does; None: remove the request, as on a full disk."""
    request = wait_until(lambda: read_request(run))
    if answer is not None:
        request.folder(run).mkdir()
        write_json(request.answer(run), answer)
    run.ask.unlink()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"steps": [4, 6], "checkpoint": None, "errors": ["rank 1: no room"]}, "error: profile: rank 1: no room; see "),
        (None, "ASK was removed, and there is no answer; see "),
    ],
)
def test_an_answer_that_failed_is_an_error(answer, error, run, capsys, monkeypatch):
    monkeypatch.setattr(ask, "MAX_LATE_S", 0.05)
    thread = threading.Thread(target=answered_meanwhile, args=[run, answer])
    thread.start()
    assert main(["ask", str(run.path), "profile"]) == 1
    thread.join()
    assert error in capsys.readouterr().err


def test_a_second_request_is_refused_while_one_is_open(run, capsys):
    thread = threading.Thread(target=main, args=[["ask", str(run.path), "stacks"]])
    thread.start()
    first = wait_until(lambda: read_request(run))
    assert main(["ask", str(run.path), "save"]) == 2
    assert (
        f"a request is open: {run.ask} (stacks); its answer will be in {first.folder(run)}" in capsys.readouterr().err
    )
    assert read_request(run) == first
    answered_meanwhile(run, {"steps": None, "checkpoint": None, "errors": []})
    thread.join()


# Real ranks -----------------------------------------------------------------------------------------------------------


# Its profiler takes longer to start, and to stop, than a rank may be silent.
RECIPE = """
import time
import torch
from tests.helpers.faulty_data import *

start, stop = torch.profiler.profile.start, torch.profiler.profile.stop
torch.profiler.profile.start = lambda profiler: time.sleep(4) or start(profiler)
torch.profiler.profile.stop = lambda profiler: time.sleep(4) or stop(profiler)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("by", "recipe"), [("fnet run", "slow_profiler"), ("torchrun", "tests.helpers.faulty_data")])
def test_two_ranks_answer_while_they_train(by, recipe, tmp_path, capfd):
    job, run = tmp_path / "job.toml", RunDir(tmp_path / "job")
    job.write_text(
        f'run = {{root = "{tmp_path}"}}\ndata = {{dataset = "synthetic", global_batch_size = 16}}\n'
        'parallel = {device = "cpu", timeout_s = 2}\ntracking = {wandb = "disabled"}\n'
    )
    (tmp_path / "slow_profiler.py").write_text(RECIPE)
    launch = (*JOBS_RUN, str(job), "--nproc-per-node", "2")
    if by == "torchrun":
        launch = (*torchrun(2), *TRAINER, "--config", str(job))
    words = ("--run.name", "job", "--recipe", recipe, "--data.fault", "long")
    with start(*launch, *words, cwd=tmp_path, PYTHONPATH=str(REPOSITORY)) as launcher:
        wait_until(lambda: run.metrics_log.exists() and run.metrics_log.stat().st_size > 0)
        for words in (["save"], ["stacks"], ["profile", "--steps", "7", "--rank", "1"]):
            assert main(["ask", str(run.path), *words]) == 0
        answered = capfd.readouterr().out.splitlines()
        assert main(["stop", str(run.path)]) == 0
        ended = launcher.end()
    said = [line.rpartition(": ")[2] for line in ended.out.splitlines() if line.startswith("`fnet ask")]
    assert len(said) == 3
    promised = [Path(line.rpartition(" will be in ")[2]) for line in answered[::2]]
    assert [f"saved {said[0]}", said[1]] == answered[1:4:2]
    assert said[1:] == [*map(str, promised[1:])]
    assert RunDir(run.path).checkpoints / Path(said[0]).name in run.checkpoints.iterdir()
    assert sorted(path.name for path in promised[1].glob("*.txt")) == ["rank_0.stacks.txt", "rank_1.stacks.txt"]
    assert sorted(path.name for path in promised[2].glob("rank_*")) == ["rank_1.operations.txt", "rank_1.trace.json.gz"]
    first, last = read_json(promised[2] / "answer.json")["steps"]
    assert answered[-1] == f"steps {first:,} to {last:,}: {promised[2]}"
    assert last - first == 6
    assert not run.ask.exists()
