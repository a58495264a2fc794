"""Every state of a run that its files and the process that owns it can tell."""

from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt, last_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, write_json
from jobs.monitor import run_state
from tests.helpers.made_run import CRASH, NOTHING, age, change_owner, claimed, train_line


def state_of(run: RunDir) -> str:
    return run_state.read_status(run).state.text.replace("\n", " ")


def test_a_run_is_starting_before_its_first_step_and_then_running(tmp_path: Path) -> None:
    run, _ = claimed(tmp_path, NOTHING)
    assert state_of(run) == "starting"
    metrics_log.append(run.metrics_log, [train_line(1, 1)])
    assert state_of(run) == "running"


def test_a_later_attempt_is_resuming_until_it_records_a_step(tmp_path: Path) -> None:
    """It may be starting or repeating recorded steps, which are not written twice: files do not tell which."""
    run, attempt = claimed(tmp_path)
    assert state_of(run) == "running"
    end_attempt(attempt, "signal_term", 120, 75)
    claim_attempt(run)
    assert state_of(run) == "resuming"
    metrics_log.append(run.metrics_log, [train_line(121, 2)])
    assert state_of(run) == "running"


@pytest.mark.parametrize(
    ("how", "reason", "words"),
    [
        ("finished", "finished", "finished"),
        ("stopped", "signal_usr1", "stopped (signal_usr1)"),
        ("failed", "no_progress", "failed (no_progress)"),
    ],
)
def test_an_ended_run_shows_status_and_reason(tmp_path: Path, how: str, reason: str, words: str) -> None:
    run, attempt = claimed(tmp_path)
    write_json(run.outcome, CRASH | {"status": how, "reason": reason})
    end_attempt(attempt, reason, 120, 1)
    assert state_of(run) == words
    run.outcome.unlink()
    assert state_of(run) == words, "end.json knows it too"


def test_a_killed_owner_is_told_from_a_living_one(tmp_path: Path, gone_pid: int) -> None:
    run, attempt = claimed(tmp_path)
    change_owner(attempt, pid=gone_pid)
    assert state_of(run) == "gone"
    write_json(run.outcome, CRASH | {"status": "stopped", "reason": "stop_file"})
    assert state_of(run) == "stopped (stop_file)", "rank 0 had said how before its launcher was killed"


def test_an_outcome_older_than_the_attempt_belongs_to_the_one_before(tmp_path: Path, gone_pid: int) -> None:
    run, attempt = claimed(tmp_path)
    write_json(run.outcome, CRASH)
    end_attempt(attempt, "crash", 40, 1)
    age(run.outcome, 5)
    second = claim_attempt(run)
    assert state_of(run) == "resuming"
    change_owner(second, pid=gone_pid)
    assert state_of(run) == "gone"


@pytest.mark.parametrize(("seconds", "words"), [(20, "running"), (45, "silent 45 s"), (7300, "silent 2 h 01 min")])
def test_an_owner_without_a_heartbeat_is_silent_for_some_time(tmp_path: Path, seconds: int, words: str) -> None:
    run, attempt = claimed(tmp_path)
    change_owner(attempt, host="node7")
    age(attempt.heartbeat, seconds)
    assert state_of(run) == words


def test_a_run_is_restarting_between_two_attempts_of_a_launcher(tmp_path: Path, gone_pid: int) -> None:
    run, attempt = claimed(tmp_path)
    write_json(run.outcome, CRASH)
    assert state_of(run) == "ending", "rank 0 has failed; its launcher has not said yet what it makes of it"
    end_attempt(attempt, "crash", 40, 1, restarts=True)
    assert state_of(run) == "restarting"
    age(attempt.end, 50)
    assert state_of(run) == "silent 50 s"
    change_owner(attempt, pid=gone_pid)
    assert state_of(run) == "gone"


def test_a_stop_file_makes_only_a_living_run_stopping(tmp_path: Path) -> None:
    run, attempt = claimed(tmp_path)
    run.stop.touch()
    assert state_of(run) == "stopping"
    end_attempt(attempt, "crash", 40, 1)
    assert state_of(run) == "failed (crash)"


def test_an_end_between_two_reads_is_not_taken_for_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner writes outcome and end and leaves between two looks: a watcher that says "gone" would end too early."""
    run, attempt = claimed(tmp_path)

    def leaves(owner: object) -> bool:
        write_json(run.outcome, CRASH | {"status": "finished", "reason": "finished"})
        end_attempt(attempt, "finished", 120, 0)
        return True

    monkeypatch.setattr(run_state, "owner_has_exited", leaves)
    assert state_of(run) == "finished"


def test_an_attempt_claimed_between_two_reads_decides_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone_pid: int
) -> None:
    run, attempt = claimed(tmp_path)
    change_owner(attempt, pid=gone_pid)
    is_gone = run_state.owner_has_exited

    def followed(owner: dict[str, Any]) -> bool:
        if last_attempt(run) == attempt:
            claim_attempt(run)
        return is_gone(owner)

    monkeypatch.setattr(run_state, "owner_has_exited", followed)
    assert state_of(run) == "resuming"
