"""Tests of `fnet status`, `logs` and `stop` on a real Slurm: runs that wait, begin, are requeued, or are killed.

The jobs are shell scripts and a small program that claims attempts as a launcher does: no network, no torch.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run.run_dir import RunDir, write_json
from jobs.__main__ import main
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.daemons import start_controller
from tests.conftest import REPOSITORY
from tests.helpers.made_run import NOTHING, make_run
from tests.helpers.slurm_commands import ask, kill_controller, submit, wait_for, wait_until_saved

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]

Screen = pytest.CaptureFixture[str]

# A launcher: it prints, trains nothing, and at a file `go` stops as after Slurm's warning; started again, it finishes.
LAUNCHER = """
import os, sys, time
from pathlib import Path
from fnet_dist.run.attempt import claim_attempt, heartbeat_thread
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, write_json
from slurm import client

run, job = RunDir(Path(sys.argv[1])), os.environ["SLURM_JOB_ID"]
restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
nodes = os.environ["SLURM_JOB_NODELIST"]
begin = {"world_size": 1, "nodes": nodes, "slurm_job_id": job, "slurm_restart_count": restarts}
attempt = claim_attempt(run, **begin)
with heartbeat_thread(attempt):
    attempt.log(0).write_text(f"hello {restarts}\\n")
    while not (run.path / "go").exists():
        time.sleep(0.05)
if restarts == 0:
    end_attempt(attempt, "signal_usr2", 5, 75)
    client.requeue(job, restarts)
else:
    write_json(run.outcome, {"status": "finished", "reason": "finished", "step": 9, "epoch": 1, "exit_code": 0})
    end_attempt(attempt, "finished", 9, 0)
"""


@pytest.fixture(autouse=True)
def on_cluster(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send every Slurm command to the cluster; cancel its jobs after each test."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(REPOSITORY)
    yield
    ask(cluster, "scancel", "--me")


def sent(cluster: LocalCluster, root: Path, script: str, *options: str, name: str = "r") -> tuple[RunDir, str]:
    """Submit this script as a run's job; return the run and the job's id."""
    run = make_run(root, NOTHING) if name == "r" else RunDir(root / name)
    run.submitit.mkdir(parents=True, exist_ok=True)
    job_id = str(submit(cluster, run.submitit / "%j_0_log.out", script, *options))
    write_json(run.job, {"id": job_id, "cluster": "slurm", "time": time.time()})
    return run, job_id


def said(run: RunDir, screen: Screen) -> dict[str, Any]:
    """Return what status --json prints of the run."""
    assert main(["status", str(run.path), "--json"]) == 0
    found: dict[str, Any] = json.loads(screen.readouterr().out)
    return found


def wait_for_state(run: RunDir, state: str, screen: Screen) -> dict[str, Any]:
    return wait_for(lambda: found if (found := said(run, screen))["state"] == state else None)


def refused(screen: Screen, *argv: str) -> str:
    assert main(argv) == 2
    return screen.readouterr().err


def logs_of(run: RunDir) -> subprocess.Popen[str]:
    """Start `logs -f` of the run."""
    words = [sys.executable, "-m", "jobs", "logs", "-f", str(run.path)]
    return subprocess.Popen(words, cwd=REPOSITORY, env={**os.environ}, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(60)
def test_a_waiting_job_is_shown_with_slurms_reason_and_then_as_cancelled(
    cluster: LocalCluster, tmp_path: Path, capsys: Screen
) -> None:
    run, job_id = sent(cluster, tmp_path, "sleep 60", "--begin=now+1hour")
    found = said(run, capsys)
    assert (found["state"], found["detail"], found["ended"]) == ("queued", "BeginTime", False)
    assert (found["job"]["id"], found["job"]["state"], found["job"]["told_by"]) == (job_id, "PENDING", "squeue")
    assert found["job"]["expected"] > time.time() + 3000
    assert main(["status", "--root", str(tmp_path)]) == 0
    assert "(BeginTime)" in capsys.readouterr().out
    assert f"has no attempt yet, queued: job {job_id} (BeginTime); -f" in refused(capsys, "logs", str(run.path))
    assert main(["stop", str(run.path)]) == 0
    assert f"job {job_id} (queued) will stop when it starts" in capsys.readouterr().out
    with logs_of(run) as follower:
        assert follower.stdout is not None
        wait_for(lambda: "queued" in follower.stdout.readline())
        ask(cluster, "scancel", job_id)
        found = wait_for_state(run, "cancelled", capsys)
        assert (found["detail"], found["ended"]) == ("not begun", True)
        assert follower.communicate(timeout=30)[0] == f"r: job {job_id}: cancelled (not begun)\n"
    assert follower.returncode == 0
    run.stop.unlink()
    assert f"job {job_id} has ended (cancelled)" in refused(capsys, "stop", str(run.path))
    assert not run.stop.exists()


@pytest.mark.timeout(60)
def test_a_job_that_failed_before_its_first_attempt_shows_its_launchers_output(
    cluster: LocalCluster, tmp_path: Path, capsys: Screen
) -> None:
    run, job_id = sent(cluster, tmp_path, "echo no such module >&2; exit 1")
    found = wait_for_state(run, "failed", capsys)
    assert (found["detail"], found["ended"], found["attempts"]) == ("not begun", True, [])
    expected = "node 0 | no such module\n"
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == f"job {job_id} has not begun an attempt; its launchers printed:\n{expected}"
    assert main(["logs", "-f", str(run.path)]) == 0
    assert capsys.readouterr().out.endswith(f"r: job {job_id}: failed (not begun)\nits launchers printed:\n{expected}")


@pytest.mark.timeout(60)
def test_a_job_whose_output_its_node_could_not_write_is_explained(
    cluster: LocalCluster, tmp_path: Path, capsys: Screen
) -> None:
    """It ends with 0:53 and leaves no line anywhere: bcbio-nextgen issue 278."""
    run = make_run(tmp_path, NOTHING)
    job_id = str(submit(cluster, Path("/nonexistent/%j.out"), "echo never printed"))
    write_json(run.job, {"id": job_id, "cluster": "slurm", "time": time.time()})
    assert wait_for_state(run, "failed", capsys)["detail"] == "not launched"
    expected = "Slurm could not write the job's output on its node (exit code 0:53)"
    assert main(["status", str(run.path)]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())
    assert refused(capsys, "logs", str(run.path)).startswith(f"error: job {job_id}: failed (not launched): {expected}")
    assert main(["logs", "-f", str(run.path)]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.timeout(90)
def test_logs_follow_a_run_from_one_allocation_into_the_next(
    cluster: LocalCluster, tmp_path: Path, capsys: Screen
) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    run, job_id = sent(cluster, tmp_path, f"{sys.executable} {tmp_path}/launcher.py {tmp_path}/r", "--nodes=2")
    found = wait_for_state(run, "starting", capsys)
    found = wait_for(lambda: found if (found := said(run, capsys))["nodes"] else None)
    assert (found["state"], found["job"]["state"], found["nodes"]) == ("starting", "RUNNING", "node[0-1]")
    assert len(found["attempts"]) == 1
    assert found["job"]["ends"] is None or found["job"]["ends"] > time.time()
    with logs_of(run) as follower:
        (run.path / "go").touch()
        found = wait_for_state(run, "requeued", capsys)
        (run.path / "go").unlink()
        assert found["detail"] in (None, "BeginTime")  # no reason yet while the allocation is being cleared
        assert (found["ended"], found["job"]["restarts"]) == (False, 1)
        assert main(["stop", str(run.path)]) == 0
        assert f"job {job_id} (requeued) will stop when it starts" in capsys.readouterr().out
        found = wait_for(lambda: found if len((found := said(run, capsys))["attempts"]) == 2 else None)
        assert (found["ended"], [attempt["end"] for attempt in found["attempts"]][1]) == (False, "signal_usr2")
        assert found["attempts"][0]["waited_s"] > 4, "cred_expire"
        (run.path / "go").touch()
        shown = follower.communicate(timeout=30)[0]
    again = rf"queued again: job {job_id}( \(BeginTime\))?"
    assert re.fullmatch(rf"hello 0\n({again}\n)+attempt 2\nhello 1\n", shown), shown
    assert said(run, capsys)["state"] == "finished"
    assert main(["status", job_id, "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("r    finished")


@pytest.mark.timeout(60)
def test_a_killed_launcher_is_failed_and_not_silent(cluster: LocalCluster, tmp_path: Path, capsys: Screen) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    run, job_id = sent(cluster, tmp_path, f"exec {sys.executable} {tmp_path}/launcher.py {tmp_path}/r")
    wait_for(lambda: said(run, capsys)["attempts"])
    ask(cluster, "scancel", "--signal=KILL", "--batch", job_id)
    found = wait_for(lambda: found if (found := said(run, capsys))["ended"] else None)
    assert (found["state"], found["attempts"][0]["end"]) == ("failed", "failed")
    with logs_of(run) as follower:
        assert follower.communicate(timeout=30)[0] == f"hello 0\nr: job {job_id}: failed\n"


@pytest.mark.timeout(90)
def test_without_slurmctld_the_table_has_a_note(cluster: LocalCluster, tmp_path: Path, capsys: Screen) -> None:
    run, job_id = sent(cluster, tmp_path, "sleep 60", "--begin=now+1hour")
    wait_until_saved(cluster, int(job_id))
    kill_controller(cluster)
    try:
        began = time.monotonic()
        assert main(["status", "--root", str(tmp_path)]) == 0
        assert time.monotonic() - began < 20  # squeue and sacct are given five seconds each
        rows = capsys.readouterr().out.splitlines()
        assert rows[2].split()[:2] == ["r", "submitted"]
        assert rows[-1].startswith(("Slurm does not answer", "slurmctld does not answer"))
        assert main(["stop", str(run.path)]) == 0
        assert f"job {job_id} (submitted) will stop if it starts" in capsys.readouterr().out
    finally:
        start_controller(cluster)
    wait_for_state(run, "queued", capsys)


@pytest.mark.timeout(90)
def test_accounting_answers_while_slurmctld_is_away(
    accounted: LocalCluster, tmp_path: Path, capsys: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in accounted.environment.items():
        monkeypatch.setenv(name, value)
    run, _ = sent(accounted, tmp_path, "exit 1")
    other, _ = sent(accounted, tmp_path / "other", "sleep 60")
    wait_for_state(run, "failed", capsys)
    wait_for(lambda: {"FAILED", "RUNNING"} <= {*ask(accounted, "sacct", "-nX", "--format=State").split()})
    kill_controller(accounted)
    found = said(run, capsys)
    assert (found["state"], found["detail"], found["job"]["told_by"]) == ("failed", "not begun", "sacct")
    found = said(other, capsys)
    assert (found["state"], found["job"]["told_by"]) == ("starting", "sacct")
