"""Notices: each event once over all attempts, none lost on a full disk, and no secret in them."""

import json

import pytest

from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.notices import NoticeLog, NoticeReader, read_notices
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt, note_failures
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import StoppedError
from tests.fnet_dist.training.test_recorder import full_disk


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "r")


def next_attempt(run):
    attempt = claim_attempt(run)
    end_attempt(attempt, "crash", 0, 1)
    return attempt


def ids(run):
    return [notice["id"] for notice in read_notices(run)]


def taken(run):
    """Take all that is new, as a process of its own would."""
    reader = NoticeReader(run, run.notices_given)
    found = []
    while reader.has_new():
        found.append(reader.take()["id"])
    return found


def test_an_event_is_added_once_over_all_attempts_and_given_once_by_all_readers(run):
    given = []
    for _ in range(2):
        log = NoticeLog(next_attempt(run))
        for _ in range(2):
            log.add("saves_failing", "saves fail after step 7", "cannot save", 9)
            log.add_end("finished", "finished", 20, metric=("accuracy", 0.5))
            log.add_end("stopped", "signal_term", 15)
        given += taken(run)
    once = ["saves fail after step 7", "finished at step 20", "stopped in attempt 1"]
    assert ids(run) == [*once, "stopped in attempt 2"] == given
    assert read_notices(run)[1] | {"time": 0} == {
        "id": "finished at step 20",
        "kind": "finished",
        "text": "r has finished after step 20",
        "run": "r",
        "step": 20,
        "attempt": 1,
        "time": 0,
        "reason": "finished",
        "metric": "accuracy",
        "value": 0.5,
    }


def test_a_notice_is_counted_before_it_is_sent(run):
    NoticeLog(next_attempt(run)).add_end("finished", "finished", 20)
    reader = NoticeReader(run, run.notices_given)
    assert reader.has_new()
    assert json.loads(run.notices_given.read_text() if run.notices_given.exists() else "0") == 0
    reader.take()
    assert json.loads(run.notices_given.read_text()) == {"given": 1}


def test_a_line_torn_by_a_kill_is_removed_and_is_no_notice(run):
    log = NoticeLog(next_attempt(run))
    log.add_end("stopped", "signal_term", 15)
    whole = run.notices.read_bytes()
    run.notices.write_bytes(whole + whole[:40])
    reader = NoticeReader(run, run.notices_given)
    assert reader.has_new()
    assert reader.take()["id"] == "stopped in attempt 1"
    assert not reader.has_new()
    log.add_end("finished", "finished", 20)
    assert ids(run) == ["stopped in attempt 1", "finished at step 20"]
    assert reader.has_new()
    assert taken(run) == ["finished at step 20"]


def test_after_the_file_was_removed_the_next_notice_is_given(run):
    NoticeLog(next_attempt(run)).add_end("stopped", "signal_term", 15)
    assert taken(run) == ["stopped in attempt 1"]
    run.notices.unlink()
    NoticeLog(next_attempt(run)).add_end("finished", "finished", 20)
    assert taken(run) == ["finished at step 20"]


def test_on_a_full_disk_a_notice_waits_for_room(run):
    log = NoticeLog(next_attempt(run))
    with full_disk(100):
        for _ in range(3):
            log.add("saves_failing", "saves fail after step 7", "cannot save", 9)
        assert ids(run) == []
    log.write()
    assert ids(run) == ["saves fail after step 7"]


def test_an_attempt_that_lost_the_run_adds_nothing(run):
    log = NoticeLog(next_attempt(run))
    next_attempt(run)
    log.add_end("failed", "crash", 3, "an error")
    assert ids(run) == []


def test_a_secret_in_an_error_is_not_in_the_notice(run, monkeypatch):
    secrets = {"WANDB_API_KEY": "canary00" * 5, "MAIL_PASSWORD": "canary11", "MAIL_PASSWORD_2": "canary1122"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_KEY", "an")
    message = f"{'x' * 390} {secrets['WANDB_API_KEY']} and\ncanary1122 an error"  # a cut must not leave a part of one
    NoticeLog(next_attempt(run)).add_end("failed", "crash", 3, message)
    NoticeLog(next_attempt(run)).add_end("failed", "crash", 3, "canary1122 an error")
    assert "canary" not in run.notices.read_text()
    assert read_notices(run)[1]["text"] == "r has failed after step 3 (crash): $MAIL_PASSWORD_2 an error"


@pytest.mark.parametrize(
    ("owns", "restarts", "error", "expected"),
    [
        (True, False, ValueError("odd"), ["r has failed after step 8 (crash): ValueError: odd"]),
        (True, True, ValueError("odd"), []),  # torchrun starts it again
        (True, True, StoppedError(8, "stop_file", RunDir), ["r has stopped after step 8 (stop_file)"]),
        (False, False, ValueError("odd"), []),  # the launcher decides
        (False, False, StoppedError(8, "stop_file", RunDir), []),
    ],
)
def test_without_a_launcher_rank_0_tells_of_a_failure_that_is_not_restarted_and_of_a_stop(
    run, owns, restarts, error, expected
):
    attempt = next_attempt(run)
    outcome = RunOutcomeWriter(attempt, owns, step=8, notices=NoticeLog(attempt), restarts=restarts)
    with pytest.raises(type(error)), note_failures(outcome):
        raise error
    assert [notice["text"] for notice in read_notices(run)] == expected
