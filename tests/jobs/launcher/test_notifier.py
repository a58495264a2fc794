"""The site's command gets each notice once, as JSON, and can neither hold the run up nor change how it ends."""

import json
import time
from pathlib import Path

import pytest

from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.notices import NoticeLog
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import run_dir_of
from jobs.launcher import notifier
from jobs.launcher.notifier import Notifier
from jobs.launcher.restart_policy import RestartDecision
from tests.helpers.log_lines import log_lines
from tests.helpers.processes import all_gone, wait_until
from tests.helpers.starts import settings

FAILED = RestartDecision("failed", "crash", 1, 7, message="not tried again", cause="rank 1: $(touch x); `touch x`")
STOPPED = RestartDecision("stopped", "signal_usr2", 75, 7)


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path, tracking={"wandb": "disabled"})


@pytest.fixture
def attempt(config) -> Attempt:
    attempt = claim_attempt(run_dir_of(config))
    end_attempt(attempt, "crash", 0, 1)
    return attempt


def command(folder: Path, body: str) -> list[str]:
    """Return the words of a command that a shell script in `folder` is; `body` may use $1, which is `folder`."""
    script = folder / "tell me"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return [str(script), str(folder)]


def end(outlet: Notifier, decision: RestartDecision) -> None:
    outlet.add_end(decision, in_job=False)
    outlet.send(decision)


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_command_gets_each_notice_as_json_at_once_and_none_twice(tmp_path, config, attempt, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary00" * 5)
    monkeypatch.chdir(tmp_path)
    told = command(tmp_path, 'cat >> "$1/calls"; env > "$1/env"')
    for _ in range(2):
        with Notifier(told) as outlet:
            outlet.begin(attempt, config)
            NoticeLog(attempt).add("best", "best at step 5", "has its best loss", 5, metric=("loss", 0.25))
            wait_until(lambda: (tmp_path / "calls").exists())  # while the ranks run
            end(outlet, FAILED)
            assert len(calls(tmp_path)) == 2
    best, failed = calls(tmp_path)
    assert (best["kind"], best["metric"], best["value"], best["step"]) == ("best", "loss", 0.25, 5)
    assert failed["text"] == "r has failed after step 7 (crash): rank 1: $(touch x); `touch x`; not tried again"
    assert (failed["kind"], failed["reason"], failed["attempt"]) == ("failed", "crash", 1)
    assert not (tmp_path / "x").exists()
    environment = (tmp_path / "env").read_text()
    assert "PATH=" in environment
    assert "canary" not in environment + json.dumps(calls(tmp_path))


@pytest.mark.parametrize("when", ["while the ranks run", "at the end"])
def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path, config, attempt, monkeypatch, when):
    monkeypatch.setattr(notifier, "NOTICE_S", 0.5)
    began = time.monotonic()
    with log_lines() as logged, Notifier(command(tmp_path, 'sleep 300 & echo $! $$ > "$1/pids"; wait')) as outlet:
        outlet.begin(attempt, config)
        if when == "at the end":
            end(outlet, FAILED)
        else:
            NoticeLog(attempt).add("best", "best at step 5", "has its best loss", 5)
            wait_until(lambda: logged, 5)
    assert time.monotonic() - began < 5
    assert all_gone([*map(int, (tmp_path / "pids").read_text().split())])
    [line] = logged
    assert "tell me has not ended within 0.5 s" in line


def test_what_fails_is_one_warning_and_each_notice_is_still_given(tmp_path, config, attempt):
    with log_lines() as logged, Notifier(command(tmp_path, 'cat >> "$1/calls"; echo no mail here; exit 3')) as outlet:
        outlet.begin(attempt, config)
        NoticeLog(attempt).add("best", "best at step 5", "has its best loss", 5)
        end(outlet, FAILED)
    [line] = logged
    assert "tell me has ended with exit code 3 (no mail here); the run goes on" in line
    assert len(calls(tmp_path)) == 2
    with log_lines() as logged, Notifier(["/nowhere/at/all"]) as outlet:
        outlet.begin(attempt, config)
        end(outlet, STOPPED)
    [line] = logged
    assert "/nowhere/at/all: No such file or directory" in line


def test_a_second_end_is_given_too(tmp_path, config, attempt):
    """Slurm may refuse the requeue that the first one told of."""
    with Notifier(command(tmp_path, 'cat >> "$1/calls"')) as outlet:
        outlet.begin(attempt, config)
        outlet.add_end(STOPPED, in_job=True)
        outlet.add("requeued", STOPPED)
        outlet.send(STOPPED)
        outlet.add("stopped", STOPPED, "not queued again: Slurm is away")
        outlet.send(STOPPED)
        assert [call["text"] for call in calls(tmp_path)] == [
            "r has stopped after step 7 (signal_usr2) and asks Slurm to queue its job again",
            "r has stopped after step 7 (signal_usr2): not queued again: Slurm is away",
        ]


def test_another_launcher_that_has_taken_the_run_over_gives_the_rest(tmp_path, config, attempt):
    with Notifier(command(tmp_path, 'cat >> "$1/calls"')) as outlet:
        outlet.begin(attempt, config)
        NoticeLog(attempt).add_end("stopped", "signal_usr2", 7)
        claim_attempt(attempt.run)
    assert not (tmp_path / "calls").exists()


def test_without_a_command_and_alerts_nothing_is_written(config, attempt):
    with Notifier(()) as outlet:
        outlet.begin(attempt, config)
        end(outlet, FAILED)
    assert not attempt.run.notices.exists()
