"""The end of a run is told once, to W&B and to the site's command, over all attempts and every `sync`.

Real launchers and the real SDK, against the backend of tests/helpers/wandb_server.py.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run.notices import read_notices
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from tests.helpers.processes import JOBS_RUN, all_gone, start, wait_until
from tests.helpers.tracked_runs import end, expected, in_wandb, job, last_step, one_process, sync, two_ranks
from tests.helpers.wandb_http import API_KEY
from tests.helpers.wandb_server import WandbServer
from tests.jobs.launcher.test_restarts import BROKEN_RECIPE, ranks_of

pytestmark = pytest.mark.processes

ALERTS = ("--tracking.alerts", "on")


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a site whose command writes what it gets to CALLS."""
    script = tmp_path / "tell"
    script.write_text('#!/bin/sh\ncat >> "$1"\n')
    script.chmod(0o755)
    (tmp_path / "site.toml").write_text("notify = \"'$TOOLS/tell' $TOOLS/calls\"\n")
    return {"FNET_SITE": str(tmp_path / "site.toml"), "TOOLS": str(tmp_path)}


def calls(folder: Path) -> list[dict[str, Any]]:
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alerts(run: RunDir, server: WandbServer) -> list[str]:
    """Return the titles of the alerts in W&B."""
    return [alert["title"] for alert in in_wandb(run, server).alerts]


def test_a_run_that_fails_for_good_is_one_alert_and_one_call_with_the_reason_and_no_key(
    server: WandbServer, site: dict[str, str], tmp_path: Path
) -> None:
    """The first attempt's crash is restarted and told to nobody. The error quotes the API key."""
    key = 'os.environ["WANDB_API_KEY"]'
    recipe = BROKEN_RECIPE.replace('"17 is not to be had"', f'"17 is not to be had: " + {key}')
    (tmp_path / "broken.py").write_text(f"import os\n{recipe}")
    jobfile = tmp_path / "job.toml"
    jobfile.write_text(
        f'recipe = "broken"\nrun = {{root = "{tmp_path}/runs", name = "job"}}\ndata = {{global_batch_size = 4}}\n'
        'parallel = {device = "cpu"}\ncheckpoint = {every_steps = 1}\n'
        'tracking = {wandb = "online", alerts = "on"}\n'
    )
    environment = server.environment() | site | {"PYTHONPATH": str(tmp_path), "WANDB_MODE": ""}
    run = RunDir(tmp_path / "runs" / "job")
    ended = end((*JOBS_RUN, str(jobfile)), **environment)
    assert ended.code == 1, ended.out + ended.err
    assert [path.name for path in sorted(run.attempts.iterdir())] == ["0001", "0002"]
    [alert], [call] = in_wandb(run, server).alerts, calls(tmp_path)
    said = "(crash): rank 0: ArithmeticError: 17 is not to be had: $WANDB_API_KEY (after step "
    assert said in alert["text"]
    assert said in call["text"]
    assert (alert["title"], alert["severity"]) == ("failed: job", "ERROR")
    assert (call["kind"], call["reason"], call["attempt"], call["run"]) == ("failed", "crash", 2, "job")
    assert read_notices(run) == calls(tmp_path)
    assert in_wandb(run, server).state == "failed"
    assert in_wandb(run, server).summary["outcome/reason"] == "crash"
    sync(run, server)
    assert alerts(run, server) == ["failed: job"]
    assert API_KEY not in run.notices.read_text() + json.dumps(in_wandb(run, server).alerts)


def test_each_end_is_told_once_over_a_restart_a_stop_a_resume_and_a_sync(
    server: WandbServer, site: dict[str, str], tmp_path: Path
) -> None:
    run, environment = RunDir(tmp_path / "r"), server.environment() | site
    with start(*two_ranks(run, "online", *ALERTS, steps=100_000), **environment) as launcher:
        ranks = ranks_of(launcher)
        wait_until(lambda: checkpoint_steps(run))
        os.kill(ranks[1], signal.SIGKILL)
        ranks_of(launcher, other_than=ranks)
        began = last_step(run)
        wait_until(lambda: last_step(run) > began)
        launcher.process.terminate()
        assert launcher.end().code == 75
    assert alerts(run, server) == ["stopped: r"]
    assert in_wandb(run, server).state == "preempted"
    ended = end(two_ranks(run, "online", *ALERTS, steps=last_step(run) + 20), **environment)
    assert ended.code == 0, ended.err
    sync(run, server)
    outcome = read_outcome(run)
    assert outcome is not None
    accuracy = f"accuracy {outcome['metrics']['accuracy']:.4f}" if outcome["metrics"] else ""
    stopped, finished = calls(tmp_path)
    assert stopped["text"] == f"r has stopped after step {stopped['step']:,} (signal_term)"
    assert finished["text"] == f"r has finished after step {outcome['step']:,}: {accuracy}"
    assert alerts(run, server) == ["stopped: r", "finished: r"]
    assert [alert["severity"] for alert in in_wandb(run, server).alerts] == ["WARN", "INFO"]
    assert in_wandb(run, server).state == "finished"
    steps = [row["trainer/step"] for row in in_wandb(run, server).history]
    assert steps == [row["trainer/step"] for row in expected(run)]


def test_an_offline_run_without_a_launcher_is_told_by_sync_and_once(server: WandbServer, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    with start(*one_process(run, "offline", *ALERTS, steps=100_000), **server.environment()) as trainer:
        wait_until(lambda: last_step(run) > 10)
        trainer.process.terminate()
        assert trainer.end().code == 75
    words = one_process(run, "offline", "--tracking.alerts", "best", steps=last_step(run) + 20)
    ended = end(words, **server.environment())
    assert ended.code == 0, ended.err
    assert [notice["kind"] for notice in read_notices(run)] == ["stopped", "finished"]
    for _ in range(2):
        sync(run, server)
        assert alerts(run, server) == ["stopped: r", "finished: r"]


def test_rank_0_that_was_killed_is_told_although_its_tracking_process_is_gone(
    server: WandbServer, tmp_path: Path
) -> None:
    run, words = RunDir(tmp_path / "r"), ("--parallel.max-restarts", "0")
    with start(*two_ranks(run, "online", *ALERTS, *words, steps=100_000), **server.environment()) as launcher:
        rank_0, _ = ranks_of(launcher)
        wait_until(lambda: server.runs and in_wandb(run, server).history)
        os.kill(rank_0, signal.SIGKILL)
        assert launcher.end().code == 1
    [alert] = in_wandb(run, server).alerts
    assert "(crash): rank 0: was killed by SIGKILL" in alert["text"]
    assert in_wandb(run, server).state == "failed"


def test_sync_that_follows_an_offline_run_sends_its_end(server: WandbServer, tmp_path: Path) -> None:
    """It ends when it sees end.json: the notice has to be there before."""
    run = RunDir(tmp_path / "r")
    with start(*two_ranks(run, "offline", *ALERTS, steps=100_000)) as launcher:
        wait_until(lambda: last_step(run) > 10)
        with start("-m", "jobs", "sync", str(run.path), "--follow", **server.environment()) as follower:
            wait_until(lambda: server.runs and in_wandb(run, server).history)
            launcher.process.terminate()
            assert launcher.end().code == 75
            assert follower.end().code == 0
    assert alerts(run, server) == ["stopped: r"]


@pytest.mark.soak
def test_what_the_server_could_not_take_is_sent_later(server: WandbServer, tmp_path: Path) -> None:
    """Neither by the tracking process, which has an open session, nor by the launcher's."""
    run = RunDir(tmp_path / "r")
    with start(*two_ranks(run, "online", *ALERTS, steps=500), **server.environment()) as launcher:
        wait_until(lambda: server.runs and in_wandb(run, server).history)
        server.refuse()
        ended = launcher.end()
    assert ended.code == 0
    assert ended.out.count("WARNING: W&B has not taken the last alerts; ") == 1
    server.accept()
    assert alerts(run, server) == []
    sync(run, server)
    assert alerts(run, server) == ["finished: r"]


# `fnet run` with a limit that a test can wait for.
IMPATIENT = """
import sys
from jobs.launcher import notifier
notifier.NOTICE_S = 1.0
from jobs.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_command_that_hangs_is_killed_and_changes_nothing(site: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tell").write_text('#!/bin/sh\nsleep 300 & echo $! $$ > "$1"; wait\n')
    run = RunDir(tmp_path / "r")
    words = two_ranks(run, "disabled", steps=20)
    with start("-c", IMPATIENT, *words[len(JOBS_RUN) - 1 :], **site) as launcher:
        ended = launcher.end()
    assert ended.code == 0, ended.err
    assert ended.out.count("tell has not ended within 1 s") == 1
    assert all_gone([*map(int, (tmp_path / "calls").read_text().split())])
    outcome = read_outcome(run)
    assert outcome is not None
    assert (outcome["status"], outcome["step"]) == ("finished", 20)


def test_each_outlet_gets_notices_only_if_it_is_on(server: WandbServer, site: dict[str, str], tmp_path: Path) -> None:
    for name, environment in {"told": site, "quiet": {}}.items():
        run = RunDir(tmp_path / name)
        words = (*JOBS_RUN, "jobs/quickstart.toml", *job(run, "online", steps=20))
        ended = end(words, **server.environment(), **environment)
        assert ended.code == 0, ended.err
        assert alerts(run, server) == []
        assert run.notices.exists() == (name == "told")
    [call] = calls(tmp_path)
    assert (call["run"], call["kind"], call["metric"]) == ("told", "finished", "accuracy")
    assert not {run.notices, run.notices_given, run.alerts_given} & {*run.path.rglob("*")}
