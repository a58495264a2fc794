"""Several runs of a sweep in one task of a real Slurm job: each as if it were alone, whatever happens to the others."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import run_undisturbed
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun, preempt
from slurm import client
from slurm.job_env import parent_of
from slurm.sandbox.conf_files import LocalCluster
from slurm.submit_env import changed
from tests.helpers.slurm_commands import naming, wait_for
from tests.helpers.submitted_runs import JOB, jobs, launcher_of, ranks_on
from tests.helpers.submitted_runs import changed as changed_job

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs"), pytest.mark.timeout(180)]
# Neither may end before both are seen to train.
JOB = changed_job(changed_job(JOB, "--run.max-steps", "960"), "--checkpoint.every-steps", "200")
LONG = changed_job(JOB, "--run.max-steps", "100000")  # does not end before it is stopped


@pytest.fixture(scope="module", autouse=True)
def here(cluster: LocalCluster) -> Iterator[None]:
    """All that is asked here is asked of the private cluster."""
    with changed(cluster.environment):
        yield


def sweep(root: Path, *words: str, job: list[str] = JOB) -> list[SupervisedSlurmRun]:
    """Run `fnet sweep`; return its runs in the order in which it lists them."""
    ended = jobs("sweep", *job, "--run.root", str(root), *words)
    assert ended.returncode == 0, ended.stderr
    names = re.findall(r"^(\S+) +--", ended.stdout, re.MULTILINE)
    runs = [RunDir(root / name) for name in names]
    return [SupervisedSlurmRun(run, (read_json(run.job) or {"id": ""})["id"]) for run in runs]


def node_of(supervised: SupervisedSlurmRun) -> str:
    return read_json(supervised.run.attempt(1) / "begin.json")["nodes"]


def drawn_of(supervised: SupervisedSlurmRun) -> tuple[float, float]:
    config = read_json(supervised.run.config)
    return config["optim"]["lr"], config["model"]["dropout"]


def gpus_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(each for each in variables if each.startswith(b"CUDA_VISIBLE_DEVICES=")).decode().partition("=")[2]


def has_ended(supervised: SupervisedSlurmRun) -> bool:
    end = (last := last_attempt(supervised.run)) and last.read_end()
    return bool(end) and not end["restarts"]


def test_drawn_runs_share_a_task_and_after_a_requeue_have_the_bits_of_one_that_trains_alone(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the runs alone: the bits depend on it
    words = ["optim.lr=log:1e-3:1e-2", "model.dropout=0:0.5", "--sbatch", "gres=gpu:2"]
    packed = sweep(tmp_path, *words, "--sample", "2", "--pack", "2")
    assert len({each.job_id for each in packed}) == 1
    home = next((tmp_path / "sweeps").iterdir())
    for each in packed:
        each.wait_for_step(60)
    ranks = [ranks_on(cluster, node_of(each), each.run)[0] for each in packed]
    assert sorted(map(gpus_of, ranks)) == ["0", "1"]
    cores = [os.sched_getaffinity(rank) for rank in ranks]
    assert not cores[0] & cores[1] or len(os.sched_getaffinity(0)) != 2, cores
    client.signal_job(packed[0].job_id, "USR2")
    for each in packed:
        ended = each.wait_for_end()
        assert (ended.state, ended.restarts, each.ends()) == ("COMPLETED", 1, ["signal_usr2", "finished"])
    lr, dropout = drawn_of(packed[1])
    settings = ["--optim.lr", str(lr), "--model.dropout", str(dropout)]
    alone = run_undisturbed(tmp_path / "alone", [*JOB, *settings])
    assert [*run_differences(alone, packed[1].run), *gaps(packed[1].run)] == []
    shown = jobs("status", str(home)).stdout.splitlines()
    order = [f"dropout {dropout}, lr {lr}" for lr, dropout in map(drawn_of, packed)]
    assert [re.split("  +", line)[:2] for line in shown[2:4]] == [[cell, "finished"] for cell in order]
    assert shown[-1].startswith("sweep: ")
    assert shown[-1].endswith("--sample 2 --pack 2")
    more = sweep(tmp_path, *words, "--sample", "3", "--dry-run")
    assert [each.run for each in more[:2]] == [each.run for each in packed]


@pytest.mark.soak
def test_a_run_that_fails_is_killed_or_is_stopped_leaves_the_others_alone_and_slurm_is_asked_once_for_all(
    cluster, tmp_path
):
    words = ("optim.lr=1e30,0.001,0.002", "--pack", "3")
    packed = sweep(tmp_path, *words, job=LONG)
    bad, killed, other = packed
    for each in (killed, other):
        each.wait_for_step(40)
    wait_for(lambda: has_ended(bad))
    failed = bad.ends()
    refused = jobs("cancel", str(other.run.path))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: job {other.job_id} also trains {killed.run.name}; "), refused.stderr
    assert f"stop {other.run.name} saves and ends this run alone" in refused.stderr
    node = node_of(other)
    os.kill(launcher_of(cluster, node, other.run), signal.SIGUSR2)
    wait_for(lambda: other.ends() == ["signal_usr2"])
    killed.wait_for_step(killed.step() + 100)
    assert other.job().restarts == 0, "asked while a run trains"
    os.kill(launcher_of(cluster, node, killed.run), signal.SIGKILL)
    for each in (killed, other):
        each.wait_for_attempt(2)
        each.wait_for_step(each.step() + 20)
    node = read_json(other.run.attempt(2) / "begin.json")["nodes"]
    parent = parent_of(launcher_of(cluster, node, killed.run))
    assert jobs("stop", str(other.run.path)).returncode == 0
    wait_for(lambda: other.ends()[-1] == "stop_file")
    listed = jobs("sweep", *LONG, "--run.root", str(tmp_path), *words, "--dry-run").stdout.splitlines()
    states = {each.run.name: line.partition("  (")[2] for each, line in zip(packed, listed, strict=False)}
    assert [*states.values()] == ["", f"running, job {killed.job_id})", ""], "what has ended can be sent again"
    killed.wait_for_step(killed.step() + 100)
    os.kill(parent, signal.SIGUSR1)  # this process alone: it hands the signal on
    ended = other.wait_for_end()
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 1, 1), "of the run that failed"
    assert [each.ends() for each in packed] == [failed, [None, "signal_usr1"], ["signal_usr2", "stop_file"]]
    assert {*failed} == {"non_finite"}
    printed = jobs("logs", "--node", "all", "--attempt", "1", str(other.run.path)).stdout
    assert f"attempt 1 of {other.run.path}: 1 rank" in printed
    assert str(bad.run.path) not in printed


@pytest.mark.soak
def test_slurm_alone_decides_after_a_preemption_and_all_end_with_the_process_that_started_them(
    cluster, tmp_path, monkeypatch
):
    (tmp_path / "site.toml").write_text(f'run_root = "{tmp_path}"\n')
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "site.toml"))
    packed = sweep(tmp_path, "optim.lr=0.001,0.002,0.003", "--pack", "2", "-p", "grace", job=LONG)
    first, second, third = packed
    assert first.job_id == second.job_id != third.job_id
    for each in packed:
        each.wait_for_step(40)
    preempt(tmp_path / "above", 3)
    for each in packed:
        each.wait_for_attempt(2)
        assert each.ends()[0] == "signal_term"
    begin = read_json(first.run.attempt(2) / "begin.json")
    node, restarts = begin["nodes"], begin["slurm_restart_count"]  # Slurm may start it and preempt it again meanwhile
    wait_for(lambda: ranks_on(cluster, node, first.run))
    os.kill(parent_of(launcher_of(cluster, node, first.run)), signal.SIGKILL)
    for each in (first, second):
        wait_for(lambda each=each: naming(str(each.run.path)) == [])
    ended = first.wait_for_end()
    assert (ended.state, ended.restarts) == ("FAILED", restarts)
    array = third.job_id.partition("_")[0]
    names = sorted(each.run.name for each in packed)
    assert jobs("cancel", array).stdout == f"job {array} is cancelled: {', '.join(names)}\n"
    assert jobs("stop", first.job_id).stderr == (
        f"error: job {first.job_id} is of 2 runs: {', '.join(sorted([first.run.name, second.run.name]))}; "
        "name one of them\n"
    )
