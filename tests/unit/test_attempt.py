"""Attempts: one start wins, a living owner is named, a dead one is followed, and every end is written."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from fnet_dist.attempt import Progress, claim_attempt, ending, last_attempt
from fnet_dist.errors import ConfigError, DataError, NonFiniteError
from fnet_dist.run_dir import RunDir, read_json, read_outcome, write_json
from fnet_dist.stopping import StoppedError


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "r")


@pytest.fixture(scope="module")
def gone():
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def claim(run):
    return claim_attempt(run, 2, {"run": {"seed": 1}})


def refusal(run):
    with pytest.raises(ConfigError) as caught:
        claim(run)
    assert caught.value.exit_code == 2
    return str(caught.value)


def change_owner(attempt, **values):
    write_json(attempt.begin, {**read_json(attempt.begin), **values})


def test_the_first_claim_makes_the_directory_and_says_who_holds_it(run):
    attempt = claim(run)
    assert attempt.number == 1
    assert attempt.begin == run.path / "attempts" / "0001" / "begin.json"
    begin = read_json(attempt.begin)
    assert [*begin] == [
        "host",
        "pid",
        "pid_started",
        "since",
        "time",
        "slurm_job_id",
        "slurm_restart_count",
        "address",
        "world_size",
        "settings",
    ]
    assert (begin["host"], begin["pid"]) == (socket.gethostname(), os.getpid())
    assert (begin["world_size"], begin["settings"]) == (2, {"run": {"seed": 1}})
    assert [path.name for path in attempt.begin.parent.iterdir()] == ["begin.json"]


def test_a_living_owner_is_named_by_host_and_pid(run):
    since = read_json(claim(run).begin)["since"]
    text = refusal(run)
    assert f"is owned by attempt 1: pid {os.getpid()} on {socket.gethostname()}, since {since}; wait for it" in text
    assert "\n" not in text
    assert last_attempt(run).number == 1


def test_an_owner_on_another_host_counts_as_alive(run, gone):
    change_owner(claim(run), host="node7", pid=gone)
    assert f"pid {gone} on node7" in refusal(run)


def test_an_attempt_that_ended_is_followed_by_the_next_number(run):
    for number in (1, 2, 3):
        attempt = claim(run)
        assert attempt.number == number
        write_json(attempt.end, {"reason": "crash"})


def test_a_dead_owner_is_followed_by_the_next_number(run, gone):
    change_owner(claim(run), pid=gone)
    assert claim(run).number == 2
    assert read_json(run.attempt(1) / "begin.json")["pid"] == gone, "what it wrote stays"


def test_an_owner_whose_number_another_process_now_has_is_dead(run):
    change_owner(claim(run), pid_started="1")
    assert claim(run).number == 2


def test_numbers_are_counted_not_sorted_as_text(run):
    for number in (9, 10, 10_000):
        run.attempt(number).mkdir(parents=True)
        write_json(run.attempt(number) / "end.json", {})
    (run.attempts / "notes").mkdir()
    assert claim(run).number == 10_001


def test_of_many_starts_at_once_exactly_one_wins(run):
    together = threading.Barrier(8)
    won, refused = [], []

    def start():
        together.wait()
        try:
            won.append(claim(run).number)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert len(refused) == 7
    assert all("another --run.name" in text for text in refused)
    assert [path.name for path in run.attempts.iterdir()] == ["0001"]


def test_a_start_that_saw_no_attempt_loses_to_one_that_was_quicker(run, monkeypatch):
    """Between its look and its rename the other one claimed; the rename decides, and the winner is named."""
    claim(run)
    looks = [None]
    monkeypatch.setattr("fnet_dist.attempt.last_attempt", lambda run: looks.pop() if looks else last_attempt(run))
    assert f"is owned by attempt 1: pid {os.getpid()} on" in refusal(run)
    assert [path.name for path in run.attempts.iterdir()] == ["0001"], "nothing of the loser stays"


# How it ends ----------------------------------------------------------------------------------------------------------


ENDS = [
    (NonFiniteError("loss is nan"), "failed", "non_finite", 1),
    (DataError("damaged"), "failed", "data", 65),
    (ConfigError("bad"), "failed", "crash", 2),
    (OSError(28, "No space left on device"), "failed", "io", 74),
    (PermissionError(13, "Permission denied"), "failed", "io", 74),
    (RuntimeError("bug"), "failed", "crash", 1),
    (StoppedError("stopped", "signal_term"), "stopped", "signal_term", 1),
    (StoppedError("stopped", "signal_int"), "stopped", "signal_int", 130),
    (KeyboardInterrupt(), "stopped", "signal_int", 130),
]


@pytest.mark.parametrize(("error", "status", "reason", "exit_code"), ENDS, ids=lambda value: repr(value)[:30])
def test_every_end_is_written_and_the_error_goes_on(run, error, status, reason, exit_code):
    progress = Progress(claim(run))
    progress.step, progress.epoch, progress.test_accuracy = 7, 2, 0.75
    with pytest.raises(type(error)) as caught, ending(progress):
        raise error
    assert caught.value is error
    assert json.loads(run.outcome.read_text()) == {
        "status": status,
        "reason": reason,
        "step": 7,
        "epoch": 2,
        "test_accuracy": 0.75,
        "exit_code": exit_code,
        "launch_id": None,
    }
    end = read_json(progress.attempt.end)
    assert [*end] == ["reason", "step", "exit_code", "time"]
    assert (end["reason"], end["step"], end["exit_code"]) == (reason, 7, exit_code)
    assert claim(run).number == 2, "an attempt that ended owns nothing any more"


def test_success_is_written_too(run):
    progress = Progress(claim(run))
    with ending(progress):
        progress.step = 938
        assert read_outcome(run) is None
    outcome = read_outcome(run)
    assert (outcome["status"], outcome["reason"], outcome["exit_code"]) == ("finished", "finished", 0)
    assert outcome["step"] == read_json(progress.attempt.end)["step"] == 938


def test_a_rank_that_holds_no_attempt_writes_nothing(run):
    run.path.mkdir(parents=True)
    with pytest.raises(RuntimeError), ending(Progress()):
        raise RuntimeError
    assert list(run.path.iterdir()) == []
