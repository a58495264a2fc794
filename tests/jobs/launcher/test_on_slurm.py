"""A run on Slurm, disturbed once by each mechanism: it ends as one that nobody disturbed, to the bit."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.launcher.time_limit import TimeLimit
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import run_undisturbed
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun
from slurm import client
from slurm.sandbox.conf_files import LocalCluster
from slurm.sandbox.daemons import start_controller, start_node
from slurm.submit_env import changed
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import ask, kill_controller, kill_node, naming, stepds, wait_for, wait_until_saved
from tests.helpers.submitted_runs import JOB, jobs, launcher_of, place, ranks_on, submit
from tests.helpers.submitted_runs import changed as changed_job

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def here(cluster: LocalCluster) -> Iterator[None]:
    """All that is asked here is asked of the private cluster."""
    with changed(cluster.environment):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same training on this machine, by two ranks that nobody disturbs."""
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), [*JOB, "--nproc-per-node", "2"])


def check(
    supervised: SupervisedSlurmRun, undisturbed: RunDir, cluster: LocalCluster, restarts: int, ends: list[str | None]
) -> None:
    """The job is over: finished, as often restarted as expected, the same run, and nothing of it is left."""
    ended = supervised.wait_for_end()
    assert (ended.state, ended.restarts, supervised.ends()) == ("COMPLETED", restarts, ends)
    assert [*run_differences(undisturbed, supervised.run), *gaps(supervised.run)] == []
    wait_for(lambda: naming(str(supervised.run.path)) == [])


@pytest.mark.soak
def test_a_warning_saves_and_asks_slurm_for_another_allocation(cluster, undisturbed, tmp_path, monkeypatch):
    """As in a rehearsal; and a slurmctld that dies meanwhile is none of its business."""
    (tmp_path / "site.toml").write_text(notify(tmp_path))
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "site.toml"))
    supervised = submit(RunDir(tmp_path / "warned"))
    wait_for(lambda: supervised.job().state == "RUNNING")
    wait_until_saved(cluster, int(supervised.job_id))
    kill_controller(cluster)
    wait_for(lambda: supervised.step() >= 60)
    start_controller(cluster)
    wait_for(lambda: supervised.job().state == "RUNNING")
    client.signal_job(supervised.job_id, "USR2")
    check(supervised, undisturbed, cluster, 1, ["signal_usr2", "finished"])
    assert told(tmp_path) == ["requeued", "finished"]
    saved = read_json(supervised.run.attempt(1) / "end.json")["step"]
    assert f"going on from step {saved}" in Attempt(supervised.run, 2).log(0).read_text()


@pytest.mark.soak
def test_two_nodes_and_then_one_train_to_the_bits_of_one_process(cluster, tmp_path):
    """Four ranks, then two, where one would have done: parallel.numerics invariant."""
    job = [*JOB, "--parallel.numerics", "invariant", "--model.dropout", "0.25", "--parallel.hash-every-steps", "60"]
    alone = run_undisturbed(tmp_path, [*job, "--nproc-per-node", "1"])
    run = RunDir(tmp_path / "moved")
    four = submit(run, "--resources.nproc-per-node", "2", job=changed_job(job, "--run.max-steps", "240"))
    assert four.wait_for_end().state == "COMPLETED"
    two = submit(run, "-N", "1", "--resources.nproc-per-node", "2", job=job)
    assert two.wait_for_end().state == "COMPLETED"
    assert [read_json(run.attempt(number) / "begin.json")["world_size"] for number in (1, 2)] == [4, 2]
    assert run_differences(alone, run, same_ranks=False) == []


def send_script(run, *sbatch, job=JOB, **settings):
    words = ["sbatch", "--parsable", f"--output={run.path}.out", *sbatch, "slurm/train.sbatch", *job, *place(run)]
    words += [word for name, value in settings.items() for word in (f"--resources.{name}", value)]
    # As from inside another job's step; and with hardly anything passed on, as `--export=NONE` does.
    stale = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SRUN_CPUS_PER_TASK": "9"}
    stale |= {"SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_MEM_PER_CPU": "1", "SLURM_TRES_PER_TASK": "cpu:9"}
    stale |= {"SLURM_THREADS_PER_CORE": "9", "SLURM_HINT": "nomultithread", "SLURM_NTASKS_PER_CORE": "9"}
    words.insert(1, f"--export=PYTHON={sys.executable},FNET_DATA,FNET_SITE,{','.join(stale)}")
    environment = {**os.environ, **stale}
    sent = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True, timeout=30
    )
    return SupervisedSlurmRun(run, sent.stdout.strip())


@pytest.mark.soak
def test_if_slurms_warning_does_not_come_node_0_saves_before_the_limit_and_asks_for_another_allocation(
    cluster, tmp_path
):
    """A limit of one minute, of which the last 45 s are for saving; Slurm would warn in the last second."""
    run = RunDir(tmp_path / "unwarned")
    longer = changed_job(JOB, "--run.max-steps", "100000")
    supervised = send_script(run, "--nodes=2", "--time=1", "--signal=USR2@1", job=longer, signal_s="90")
    supervised.wait_for_attempt(2)
    assert supervised.ends()[0] == "signal_usr2"
    assert "the job's time limit is near, and Slurm's warning has not come" in Path(f"{run.path}.out").read_text()
    client.cancel(supervised.job_id)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_srun_torchrun_saves_and_stops_as_all_others_and_the_same_script_goes_on(cluster, undisturbed, tmp_path):
    """As slurm/README.md shows it: at a warning, a stop file and a deadline."""
    run, script = RunDir(tmp_path / "torchrun"), tmp_path / "script"
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR2"
    trainer = shlex.join([*["-m", "fnet_dist.train", "--config"], *JOB, *place(run)])
    script.write_text(f"#!/bin/bash\nexport OMP_NUM_THREADS=1\nsrun {sys.executable} -m {torchrun} {trainer}\n")
    words = ["sbatch", "--parsable", f"--output={run.path}.out", "--chdir", str(REPOSITORY), str(script)]
    for reason in ("signal_usr2", "stop_file", "deadline", "finished"):
        env = {**os.environ, "FNET_DEADLINE": str(time.time())} if reason == "deadline" else None
        sent = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=30)
        supervised = SupervisedSlurmRun(run, sent.stdout.strip())
        if reason in ("signal_usr2", "stop_file"):
            supervised.wait_for_attempt(len(supervised.ends()) + 1)
            supervised.wait_for_step(supervised.step() + 40)
        if reason == "signal_usr2":
            client.signal_job(supervised.job_id, "USR2")
        if reason == "stop_file":
            assert jobs("stop", str(run.path)).returncode == 0
        assert supervised.wait_for_end().state == ("COMPLETED" if reason == "finished" else "FAILED")
        assert supervised.ends()[-1] == reason
    assert len(supervised.ends()) == 4
    assert run_differences(undisturbed, run) == []


def test_by_train_sbatch_a_killed_rank_is_replaced_in_the_allocation_and_a_requeue_loses_no_step(
    cluster, undisturbed, tmp_path
):
    """No Python of ours on the way to Slurm."""
    run = RunDir(tmp_path / "script")
    supervised = send_script(run, "--nodes=2")
    supervised.wait_for_step(60)
    # A warning may get lost: shortly before the end, node 0 leaves by itself, but not before an end that has moved.
    limit = TimeLimit(supervised.job_id, 600, supervised.job().ends)
    ask(cluster, "scontrol", "update", f"JobId={supervised.job_id}", "TimeLimit=+30")
    limit.margin_s = limit.ends - time.time() + 1
    assert not limit.has_come()
    assert limit.ends == supervised.job().ends
    os.kill(ranks_on(cluster, "node1", run)[0], signal.SIGKILL)
    supervised.wait_for_attempt(2)
    supervised.wait_for_step(supervised.step() + 40)
    assert supervised.job().restarts == 0
    ask(cluster, "scontrol", "requeue", supervised.job_id)
    check(supervised, undisturbed, cluster, 1, ["crash", "signal_term", "finished"])
    begin = read_json(run.attempt(3) / "begin.json")
    assert (begin["slurm_job_id"], begin["slurm_restart_count"], begin["nodes"]) == (supervised.job_id, 1, "node[0-1]")


def kill_a_rank(cluster: LocalCluster, supervised: SupervisedSlurmRun, node: str, attempt: int) -> None:
    """Kill a rank on `node` in this attempt, once it has trained a step that no attempt had."""
    supervised.wait_for_attempt(attempt)
    supervised.wait_for_step(supervised.step() + 1)
    os.kill(ranks_on(cluster, node, supervised.run)[0], signal.SIGKILL)


def test_after_two_failures_on_a_node_the_next_allocation_leaves_it_out(cluster, undisturbed, tmp_path, monkeypatch):
    """Two nodes of three."""
    (tmp_path / "site.toml").write_text(notify(tmp_path))
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "site.toml"))
    run = RunDir(tmp_path / "run")
    supervised = submit(run)
    for attempt in (1, 2):
        kill_a_rank(cluster, supervised, "node1", attempt)
    check(supervised, undisturbed, cluster, 1, ["crash", "bad_node", "finished"])
    assert client.host_names(client.show_job(supervised.job_id).excluded) == ("node1",)
    begin = read_json(run.attempt(3) / "begin.json")
    killed = "rank 1: was killed by SIGKILL (by the kernel, for memory? see dmesg)"
    assert client.host_names(begin["nodes"]) == ("node0", "node2")
    assert begin["excluded_nodes"] == {"node1": [f"attempt 1: {killed}", f"attempt 2: {killed}"]}
    assert [read_json(run.attempt(number) / "end.json")["restarts"] for number in (1, 2)] == [True, False]
    said = f"excludes node1 (2 failed attempts; attempt 1: {killed}; attempt 2: {killed})"
    for verb in ("status", "logs"):
        assert said in jobs(verb, str(run.path), COLUMNS="400").stdout
    assert f"WARNING: the job {said}" in (run.submitit / f"{supervised.job_id}_0_log.out").read_text()
    assert told(tmp_path) == ["node_excluded", "requeued", "finished"]


@pytest.mark.soak
def test_a_node_that_the_job_cannot_do_without_is_not_left_out(cluster, tmp_path):
    """Three nodes of three: a third failure on the node ends the run, as on one machine."""
    run = RunDir(tmp_path / "run")
    supervised = submit(run, "-N", "3", job=changed_job(JOB, "--checkpoint.every-steps", "100000"))
    for attempt in (1, 2, 3):
        kill_a_rank(cluster, supervised, "node1", attempt)
    ended = supervised.wait_for_end()
    assert (ended.state, ended.restarts, supervised.ends()) == ("FAILED", 0, ["crash", "crash", "no_progress"])
    log = (run.submitit / f"{supervised.job_id}_0_log.out").read_text()
    assert "WARNING: node1 is not excluded: the job needs 3, main has 2 other nodes like it" in log
    assert "WARNING: the job may run again on node1 (2 failed attempts; " in log


CONTAINER = """#!/bin/sh
echo "$SLURMD_NODENAME $*" >> {log}
exec bwrap --dev-bind / / "$@"
"""


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap, a real container, is not installed")
@pytest.mark.parametrize("by", ["submit", pytest.param("train.sbatch", marks=pytest.mark.soak)])
def test_through_a_container_a_run_is_warned_requeued_stopped_and_goes_on(
    cluster, undisturbed, tmp_path, by, monkeypatch
):
    """In bubblewrap Python is not the process that Slurm started. srun starts it elsewhere, as pyxis does."""
    container, log, site = tmp_path / "container", tmp_path / "log", tmp_path / "site.toml"
    container.write_text(CONTAINER.format(log=log))
    container.chmod(0o755)
    site.write_text(f'container = "{container} --setenv IN yes"\nsrun_args = ["--comment=a b", "--chdir=/"]\n')
    monkeypatch.setenv("FNET_SITE", str(site))
    run = RunDir(tmp_path / "run")

    def send():
        return submit(run) if by == "submit" else send_script(run, "--nodes=2")

    supervised = send()
    supervised.wait_for_step(60)
    client.signal_job(supervised.job_id, "USR2")
    supervised.wait_for_attempt(2)
    run.stop.touch()  # not by a command, which takes a second: the run could end before
    ended = supervised.wait_for_end()
    assert (ended.state, ended.restarts, supervised.ends()) == ("FAILED", 1, ["signal_usr2", "stop_file"])
    assert client.show_job(supervised.job_id).exit_code == 75
    supervised = send()
    check(supervised, undisturbed, cluster, 0, ["signal_usr2", "stop_file", "finished"])
    started = log.read_text().splitlines()
    assert sorted(line.split()[0] for line in started) == ["node0"] * 3 + ["node1"] * 3
    assert all(" --setenv IN yes " in f" {line}" for line in started)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap, a real container, is not installed")
def test_ranks_in_a_container_end_with_their_slurmstepd(cluster, tmp_path, monkeypatch):
    """Slurm takes the step for ended, and bubblewrap, without --die-with-parent, goes on."""
    (tmp_path / "site.toml").write_text('container = "bwrap --dev-bind / /"\n')
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "site.toml"))
    supervised = submit(RunDir(tmp_path / "run"), job=changed_job(JOB, "--run.max-steps", "100000"))
    supervised.wait_for_step(20)
    os.kill(stepds(cluster, "node1", int(supervised.job_id))["0"], signal.SIGKILL)
    assert supervised.wait_for_end().state == "FAILED"
    wait_for(lambda: naming(str(supervised.run.path)) == [])


@pytest.mark.soak
def test_a_lost_node_is_replaced_by_slurm(cluster, undisturbed, tmp_path):
    supervised = submit(RunDir(tmp_path / "lost"))
    supervised.wait_for_step(60)
    kill_node(cluster, "node0")
    try:
        wait_for(lambda: supervised.job().restarts == 1, 60)
    finally:
        start_node(cluster, "node0")
    check(supervised, undisturbed, cluster, 1, [None, "finished"])


@pytest.mark.soak
def test_submitted_from_inside_a_job_and_its_launcher_killed_it_fails_and_the_same_submit_goes_on(
    cluster, undisturbed, tmp_path
):
    run = RunDir(tmp_path / "inside")
    words = [sys.executable, "-m", "jobs", "submit", *JOB, *place(run), "-N", "2"]
    inside = ["srun", "--nodes=1", "--job-name=outer", "--cpus-per-task=2", *words]
    ended = subprocess.run(inside, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    supervised = SupervisedSlurmRun(run, read_json(run.job)["id"])
    supervised.wait_for_step(60)
    refused = jobs("submit", *JOB, *place(run), "-N", "2")
    assert refused.returncode == 2
    assert f"{run.path} is owned by Slurm job {supervised.job_id} (running); wait for it, end it with" in refused.stderr
    os.kill(launcher_of(cluster, "node0", run), signal.SIGKILL)
    ended = supervised.wait_for_end()
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    begin = run.attempt(1) / "begin.json"
    write_json(begin, read_json(begin) | {"code": "0" * 12})  # as if somebody had edited since
    again = submit(run)
    assert again.job_id != supervised.job_id
    check(again, undisturbed, cluster, 0, [None, "finished"])
    said = (run.submitit / f"{again.job_id}_0_log.out").read_text()
    assert f"WARNING: the code has changed: {read_json(run.attempt(2) / 'begin.json')['code']} runs now, 0000" in said


def site_with_a_python_of_its_own(folder: Path) -> Path:
    """Write a site.toml whose setup decides which Python runs, as a module or a conda environment does."""
    python, site = folder / "bin" / "python", folder / "site.toml"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ntouch {folder}/used_by_$SLURM_PROCID\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    site.write_text(f'python = "python"\nsetup = ["export PATH={python.parent}:$PATH"]\n{notify(folder)}')
    return site


def notify(folder: Path) -> str:
    """A line of site.toml: a command that adds what it gets to FOLDER/told."""
    command = folder / "tell"
    command.write_text('#!/bin/sh\ncat >> "$1"\n')
    command.chmod(0o755)
    return f'notify = "{command} {folder}/told"\n'


def told(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "told").read_text().splitlines()]


def test_a_suspended_job_goes_on_and_is_profiled_and_stop_saves_and_ends_it_and_cancel_ends_one_that_waits(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("FNET_SITE", str(site_with_a_python_of_its_own(tmp_path)))
    run = RunDir(tmp_path / "stopped")
    longer = changed_job(JOB, "--run.max-steps", "100000")  # it must not end before it is stopped
    supervised = submit(run, "--resources.cpus-per-rank", "4", "--parallel.timeout-s", "5", job=longer)
    supervised.wait_for_step(20)
    assert [path.name for path in sorted(tmp_path.glob("used_by_*"))] == ["used_by_0", "used_by_1"]
    ask(cluster, "scontrol", "suspend", supervised.job_id)
    wait_for(lambda: supervised.job().state == "SUSPENDED")
    began, step = time.monotonic(), supervised.step()
    wait_for(lambda: time.monotonic() - began > 8)  # in which no rank ran: not a hang of over 5 s
    ask(cluster, "scontrol", "resume", supervised.job_id)
    supervised.wait_for_step(step + 20)
    cores = len(os.sched_getaffinity(0))
    warning = f"WARNING: node1: {cores} CPUs for this task, 4 asked for"
    assert (warning in (run.submitit / f"{supervised.job_id}_1_log.out").read_text()) == (cores < 4)
    asked = jobs("ask", str(run.path), "profile", "--steps", "5")
    assert asked.returncode == 0, asked.stderr
    assert len([*run.attempt(1).glob("profile-*/rank_*.trace.json.gz")]) == 2
    assert jobs("stop", str(run.path)).returncode == 0
    ended = supervised.wait_for_end()
    assert (ended.state, ended.exit_code, ended.restarts, supervised.ends()) == ("FAILED", 75, 0, ["stop_file"])
    assert supervised.end_of(1)["step"] == checkpoint_steps(run)[0]
    assert told(tmp_path) == ["stopped"]
    assert run.sbatch.read_text() == (run.submitit / f"{supervised.job_id}_submission.sh").read_text()
    waiting = submit(run, "--sbatch", "begin=now+1hour", job=longer)
    asked = jobs("ask", str(run.path), "save")
    assert (asked.returncode, run.ask.exists()) == (2, False)
    assert "does not train: queued" in asked.stderr
    assert jobs("cancel", str(run.path)).returncode == 0
    assert waiting.wait_for_end().state == "CANCELLED"
    assert read_json(run.job)["cancelled"] > 0, "for when Slurm has forgotten it"
