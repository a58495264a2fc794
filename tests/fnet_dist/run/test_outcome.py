"""The end of attempts: every end is recorded once, by the owner, and attempts without progress are counted."""

import json
import shutil
from pathlib import Path

import pytest

from fnet_dist.errors import CheckpointError, ConfigError, DataError, LostOwnershipError, NonFiniteError
from fnet_dist.run.attempt import claim_attempt, count_stalled_attempts
from fnet_dist.run.outcome import RunOutcomeWriter, read_outcome, record_outcome
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.stop import StoppedError

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "r")


def claim(run):
    return claim_attempt(run, launch_id="abc")


# How it ends ----------------------------------------------------------------------------------------------------------


RUN = RunDir(Path("runs/r"))
ENDS = [
    (NonFiniteError("loss is nan"), "failed", "non_finite", 1),
    (DataError("damaged"), "failed", "data", 65),
    (CheckpointError("all damaged"), "failed", "checkpoint", 65),
    (ConfigError("bad"), "failed", "crash", 2),
    (OSError(28, "No space left on device"), "failed", "io", 74),
    (PermissionError(13, "Permission denied"), "failed", "io", 74),
    (RuntimeError("bug"), "failed", "crash", 1),
    (StoppedError(7, "signal_term", RUN), "stopped", "signal_term", 75),
    (StoppedError(7, "signal_int", RUN), "stopped", "signal_int", 130),
    (StoppedError(7, "deadline", RUN), "stopped", "deadline", 75),
    (StoppedError(7, "stop_file", RUN), "stopped", "stop_file", 75),
    (KeyboardInterrupt(), "failed", "signal_int", 130),
]


@pytest.mark.parametrize(("error", "status", "reason", "exit_code"), ENDS, ids=lambda value: repr(value)[:30])
def test_every_error_is_recorded_and_raised_again(run, error, status, reason, exit_code):
    progress = RunOutcomeWriter(claim(run), launch_id="abc")
    progress.step, progress.epoch, progress.metrics = 7, 2, {"accuracy": 0.75}
    with pytest.raises(type(error)) as caught, record_outcome(progress):
        raise error
    assert caught.value is error
    assert json.loads(run.outcome.read_text()) == {
        "status": status,
        "reason": reason,
        "step": 7,
        "epoch": 2,
        "metrics": {"accuracy": 0.75},
        "exit_code": exit_code,
        "launch_id": "abc",
    }
    end = read_json(progress.attempt.end)
    assert [*end] == ["reason", "step", "exit_code", "restarts", "time"]
    assert (end["reason"], end["step"], end["exit_code"], end["restarts"]) == (reason, 7, exit_code, False)
    assert claim(run).number == 2, "an attempt that ended owns nothing any more"


def test_success_is_recorded_too(run):
    progress = RunOutcomeWriter(claim(run))
    with record_outcome(progress):
        progress.step = 938
        assert read_outcome(run) is None
    outcome = read_outcome(run)
    assert (outcome["status"], outcome["reason"], outcome["exit_code"]) == ("finished", "finished", 0)
    assert outcome["step"] == read_json(progress.attempt.end)["step"] == 938


def test_a_run_that_ends_for_lack_of_a_better_evaluation_is_finished_and_says_why(run):
    progress = RunOutcomeWriter(claim(run))
    with record_outcome(progress):
        progress.finished = "patience"
    outcome = read_outcome(run)
    assert (outcome["status"], outcome["reason"], outcome["exit_code"]) == ("finished", "patience", 0)
    assert read_json(progress.attempt.end)["reason"] == "patience"


def test_a_rank_without_an_attempt_writes_nothing(run):
    run.path.mkdir(parents=True)
    with pytest.raises(RuntimeError), record_outcome(RunOutcomeWriter()):
        raise RuntimeError
    assert list(run.path.iterdir()) == []


def test_a_rank_leaves_end_json_to_the_launcher_that_owns_the_attempt(run):
    progress = RunOutcomeWriter(claim(run), owns=False)
    progress.end("failed", "crash", 1)
    assert read_outcome(run)["reason"] == "crash"
    assert not progress.attempt.end.exists()


def test_a_superseded_attempt_writes_nothing(run, impatient):
    progress = RunOutcomeWriter(claim(run))
    claim(run)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(LostOwnershipError), record_outcome(progress):
        progress.attempt.check()
    assert sorted(run.path.rglob("*")) == before


def test_a_removed_run_directory_is_not_created_again(run):
    progress = RunOutcomeWriter(claim(run))
    shutil.rmtree(run.path)
    progress.end("failed", "io", 74)
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("status", "reason", "stays"),
    [("stopped", "stop_file", False), ("finished", "finished", False), ("failed", "crash", True)]
    + [("stopped", reason, True) for reason in ("signal_usr2", "deadline", "signal_term")],
)
def test_the_stop_file_is_removed_unless_slurm_may_start_the_job_again(run, status, reason, stays):
    """It may appear while a run saves after Slurm's warning, and Slurm then starts the job again."""
    progress = RunOutcomeWriter(claim(run))
    run.stop.touch()
    progress.end(status, reason, 75)
    assert run.stop.exists() == stays


# Attempts without progress --------------------------------------------------------------------------------------------


def make_attempts(run, *ends):
    """Make ended attempts, each from (committed step at its start, reason); without end.json if the reason is None."""
    for number, (committed_step, reason) in enumerate(ends, 1):
        run.attempt(number).mkdir(parents=True)
        write_json(run.attempt(number) / "begin.json", {"committed_step": committed_step})
        if reason is not None:
            write_json(run.attempt(number) / "end.json", {"reason": reason})


@pytest.mark.parametrize(
    ("ends", "committed_step", "count"),
    [
        ([], 0, 0),
        ([(0, "crash")], 0, 1),
        ([(0, "crash"), (0, "hang"), (0, None)], 0, 3),
        ([(0, "crash"), (0, "crash")], 5, 0),
        ([(0, "crash"), (5, "crash"), (5, "io")], 5, 2),
        ([(0, "crash"), (5, "signal_term"), (5, "crash")], 5, 1),
        ([(5, "deadline"), (5, "stop_file"), (5, "signal_int")], 5, 0),
        ([(5, "crash"), (5, "lost_ownership")], 5, 2),
    ],
    ids=str,
)
def test_attempts_that_failed_without_a_new_checkpoint_are_counted(run, ends, committed_step, count):
    make_attempts(run, *ends)
    assert count_stalled_attempts(run, committed_step) == count


def test_an_attempt_without_begin_json_ends_the_count(run):
    make_attempts(run, (0, "crash"), (0, "crash"))
    (run.attempt(1) / "begin.json").unlink()
    assert count_stalled_attempts(run, 0) == 1
