"""W&B shows each row of the metrics log exactly once, whatever happens to the run.

The real SDK, online against the backend of tests/helpers/wandb_server.py, offline into files that are read back.
"""

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.console import fnet_command
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from tests.helpers.config import FashionConfig
from tests.helpers.made_run import Made, make_run, train_line
from tests.helpers.processes import start, wait_until
from tests.helpers.tracked_runs import (
    EVERY,
    check_rows,
    end,
    in_wandb,
    kill_and_resume,
    last_step,
    one_process,
    read_back,
    sync,
    two_ranks,
    wandb_sync,
)
from tests.helpers.wandb_http import API_KEY
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.processes


def command_lines() -> set[bytes]:
    """Return the command lines of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.add(path.read_bytes())
    return found


def test_online_the_history_equals_the_metrics_log_and_the_key_appears_nowhere(
    server: WandbServer, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "r")
    seen = set[bytes]()
    loud = server.environment() | {"WANDB_DEBUG": "true"}  # with it the SDK would write the key into its own log
    with start(*two_ranks(run, "auto", "--tracking.log-model", "true"), **loud) as launcher:
        while launcher.process.poll() is None:
            seen |= command_lines()
            with suppress(subprocess.TimeoutExpired):  # all that is looked for lives longer than this
                launcher.process.wait(0.1)
        ended = launcher.end()
    assert ended.code == 0, ended.err
    shown = in_wandb(run, server)
    address = f"{server.url}/tester/fnet_dist/runs/{shown.id}\n"
    assert f"W&B: {address}" in ended.out
    assert f"  W&B            {address}" in ended.out.split("finished: ")[1]
    check_rows(shown.history, run)
    assert (shown.state, shown.exit_code, shown.display_name) == (
        "finished",
        0,
        "r data.global_batch_size=1000 data.dataset=synthetic",
    )
    outcome = read_outcome(run)
    assert outcome is not None
    assert shown.summary["final/accuracy"] == outcome["metrics"]["accuracy"]
    assert shown.summary["eval/accuracy"]["max"] == shown.summary["best/accuracy"] >= outcome["metrics"]["accuracy"]
    assert shown.config["dataset"]["name"] == "synthetic data, not Fashion-MNIST"
    assert shown.config["world_size"] == 2
    assert shown.config["optim"]["lr"] == 3e-3
    assert re.fullmatch("[0-9a-f]{40}", shown.config["git"]["commit"])
    assert shown.config["versions"]["torch"]
    assert "slurm" not in shown.config  # there are no ids
    assert shown.artifacts["r-model"] == [{"model.safetensors": run.model.read_bytes()}]
    assert server.requests.count(("graphql", "UpsertBucket")) <= 4
    key = API_KEY.encode()
    assert any(b"fnet_dist.tracking.worker" in words for words in seen), "nothing was looked at"
    assert not any(key in words for words in seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert [path for path in files if key in path.read_bytes()] == []


def test_offline_rows_can_be_sent_by_either_sync_command_and_arrive_once(server: WandbServer, tmp_path: Path) -> None:
    """Trained on two ranks, stopped, and resumed on one."""
    run = RunDir(tmp_path / "r")
    with start(*two_ranks(run, "offline", steps=100_000)) as launcher:
        wait_until(lambda: run.metrics_log.exists() and last_step(run) > 40)
        launcher.process.terminate()
        assert launcher.end().code == 75
    ended = end(one_process(run, "offline", steps=last_step(run) + 40))
    assert ended.code == 0, ended.err
    report, sync_it = (f"{fnet_command()} {verb} {run.path}" for verb in ("report", "sync"))
    assert ended.out.splitlines()[-1] == f"next: {report}; {sync_it}"
    rows = read_back(run)
    check_rows(rows, run)
    assert {row["trainer/world_size"] for row in rows} == {1, 2}

    copy = RunDir(shutil.copytree(run.path, tmp_path / "copy", symlinks=True))
    assert re.search(rf"copy: {len(rows)} rows sent, 0 were there", sync(copy, server))
    shown = in_wandb(run, server)
    check_rows(shown.history, run)
    assert shown.state == "finished"
    assert re.search(rf"copy: 0 rows sent, {len(rows)} were there", sync(copy, server))
    assert not list(copy.wandb.glob("run-*")), "the SDK's own files of a sync are thrown away"
    wandb_sync(copy, server)  # it finds the SDK's mark that they are sent; `make soak` has the other order
    check_rows(shown.history, run)


@pytest.mark.soak
def test_offline_after_kills_at_random_steps_each_row_is_in_the_files_once_and_sent_once(
    server: WandbServer, tmp_path: Path
) -> None:
    """Twice; `make soak` kills five times, at other steps, online too."""
    run = RunDir(tmp_path / "r")
    kill_and_resume(run, "offline", 13, server, kills=2, synced=True)  # the second before its rows are flushed
    check_rows(read_back(run), run)
    wandb_sync(run, server)  # which passes over what `jobs sync` sends
    sync(run, server)
    check_rows(in_wandb(run, server).history, run)
    assert in_wandb(run, server).state == "finished"
    for marked in run.wandb.glob("*/*.synced"):
        marked.unlink()
    with WandbServer() as other:
        for _ in range(2):  # a file that a kill had left torn would be sent each time
            wandb_sync(run, other)
        check_rows(in_wandb(run, other).history, run)


def test_sync_follows_a_running_run_and_the_stop_button_ends_it_on_all_ranks(
    server: WandbServer, tmp_path: Path
) -> None:
    """The compute node has no internet; the machine of `jobs sync --follow` has."""
    run = RunDir(tmp_path / "r")
    with start(*two_ranks(run, "offline", steps=100_000)) as launcher:
        wait_until(lambda: run.metrics_log.exists() and last_step(run) > 2 * EVERY)
        with start("-m", "jobs", "sync", str(run.path), "--follow", **server.environment()) as follower:
            assert follower.line() == f"r: {server.url}/tester/fnet_dist/runs/{read_json(run.manifest)['id']}\n"
            rows = wait_until(lambda: server.runs and in_wandb(run, server).history)
            wait_until(lambda: len(in_wandb(run, server).history) > len(rows))
            assert launcher.process.poll() is None
            server.stop_runs.add(in_wandb(run, server).id)
            assert launcher.end().code == 75
            ended = follower.end()
            assert ended.code == 0, ended.err
    outcome = read_outcome(run)
    assert outcome is not None
    assert (outcome["status"], outcome["reason"], outcome["step"]) == ("stopped", "wandb_stop", last_step(run))
    check_rows(in_wandb(run, server).history, run)
    assert in_wandb(run, server).state == "preempted"
    assert in_wandb(run, server).summary["outcome/reason"] == "wandb_stop"
    check_rows(read_back(run), run)  # sending a run does not change its files


@pytest.fixture
def untracked(tmp_path: Path) -> RunDir:
    """A run of one epoch that is not in W&B."""
    run = make_run(tmp_path / "runs", Made(name="r", steps_per_epoch=94, epochs=1, finished=False))
    write_json(run.manifest, read_json(run.manifest) | {"id": "made", "resumed_from": None})
    config = FashionConfig.model_validate({"run": {"name": "r", "root": str(run.path.parent)}})
    write_json(run.config, config.model_dump(mode="json"))
    return run


def test_a_key_in_netrc_is_used_and_not_copied_anywhere(server: WandbServer, untracked: RunDir, tmp_path: Path) -> None:
    environment = server.environment()
    key = environment.pop("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1:{server.port}\n  login user\n  password {key}\n")
    netrc.chmod(0o600)
    ended = end(("-m", "jobs", "sync", str(untracked.path)), **environment | {"NETRC": str(netrc)})
    assert ended.code == 0, ended.err
    assert [row["trainer/step"] for row in server.runs["made"].history] == [50, 94]
    files = [path for path in untracked.path.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_the_best_accuracy_is_over_all_attempts(server: WandbServer, untracked: RunDir) -> None:
    """The SDK of each attempt sees only its own rows."""
    run = untracked
    best = next(line for line in metrics_log.read(run.metrics_log) if line["kind"] == "eval")["metrics"]["accuracy"]
    sync(run, server)
    shared = {"epoch": 2, "step": 188, "attempt": 2}
    worse = {"kind": "eval", **shared, "loss": 1.0, "metrics": {"accuracy": best / 2}}
    lines: list[Any] = [train_line(188, 2, epoch=2), worse, {"kind": "epoch", **shared, "train_loss": 1.0}]
    metrics_log.append(run.metrics_log, lines)
    sync(run, server)
    summary = server.runs["made"].summary
    assert summary["eval/accuracy"]["max"] == summary["best/accuracy"] == best
    assert summary["train/epoch_loss"] == 1.0
