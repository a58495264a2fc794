"""The client on a real Slurm, and what a task there reads from its environment."""

import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slurm import client
from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.sandbox.daemons import start_controller
from slurm.sandbox.processes import path_of, processes
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import ask, submit, title, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]

READ = f"{sys.executable} -c 'from slurm.job_env import *; print(read_allocation(), flush=True)'"


@pytest.fixture(autouse=True)
def on_cluster(request, cluster, monkeypatch):
    """Let the client use the cluster, and cancel all jobs after each test."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("SQUEUE_STATES", "COMPLETED")  # a setting of the user that must not matter
    yield
    ask(cluster, "scancel", "--me")


def in_queue(job_id, state):
    """Return the job if it is in this state."""
    return next((job for job in client.queue([job_id]) if job.state == state), None)


def slurmctld(cluster):
    """Return its process id."""
    (pid,) = [pid for pid in processes(cluster.directory, "slurmctld") if title(pid)[:1] == [path_of("slurmctld")]]
    return pid


def start(cluster, script, *options):
    """Submit a script, wait until it runs, and return its id."""
    job_id = str(submit(cluster, "/dev/null", script, *options))
    wait_for(lambda: in_queue(job_id, "RUNNING"))
    return job_id


def test_a_job_is_shown_while_it_waits_while_it_runs_and_after_its_end(cluster, tmp_path):
    script = f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; exit 3"
    options = ("--nodes=2", "--time=5", "--job-name=a|b c", "--comment=x y", f"--chdir={tmp_path}")
    job_id = str(submit(cluster, "/dev/null", script, "--hold", *options))
    waiting = client.queue([job_id])[0]
    assert (waiting.state, waiting.reason, waiting.nodes) == ("PENDING", "JobHeldUser", ())
    assert waiting.started is None
    ask(cluster, "scontrol", "release", job_id)
    running = wait_for(lambda: in_queue(job_id, "RUNNING"))
    assert (running.job_id, running.raw_job_id, running.name) == (job_id, job_id, "a|b c")
    assert (running.nodes, running.node_list, running.partition) == (("node0", "node1"), "node[0-1]", "main")
    assert abs(running.started - time.time()) < 60
    assert running.ends == running.started + 300
    (tmp_path / "go").touch()
    wait_for(lambda: not client.queue([job_id]))
    ended = client.show_job(job_id)
    assert (ended.state, ended.reason, ended.exit_code, ended.exit_signal) == ("FAILED", "NonZeroExitCode", 3, 0)
    assert (ended.restarts, ended.preempted) == (0, None)
    assert ended.started == running.started
    assert client.state_of(job_id) == ended.state
    assert client.histories([job_id]) == []


def test_an_unknown_job_is_none_and_no_error():
    assert (client.show_job("1"), client.state_of("1"), client.queue(["1"])) == (None, None, [])
    client.cancel("1")
    for command in (client.requeue, client.signal_job):
        with pytest.raises(SlurmError, match=r"^job 1 "):
            command("1", "USR2" if command is client.signal_job else 0)


def test_each_task_of_an_array_is_a_job_of_its_own(cluster):
    array = start(cluster, "sleep 100", "--array=3-4")
    tasks = wait_for(
        lambda: [job for job in client.queue([array]) if job.state == "RUNNING"][1:] and client.queue([array])
    )
    assert sorted(job.job_id for job in tasks) == [f"{array}_3", f"{array}_4"]
    first = client.show_job(f"{array}_3")
    last = client.show_job(array)
    assert (last.job_id, last.raw_job_id) == (f"{array}_4", array)
    assert client.show_job(first.raw_job_id) == first
    client.cancel(f"{array}_3")
    wait_for(lambda: client.show_job(f"{array}_3").state == "CANCELLED")
    assert client.show_job(array).state == "RUNNING"
    client.cancel(f"{array}_3")
    assert client.show_job(f"{array}_77") is None


def test_a_requeue_that_is_repeated_happens_once(cluster, tmp_path):
    output = tmp_path / "output"
    array = str(submit(cluster, output, f"srun {READ}; sleep 100", "--array=7"))
    wait_for(lambda: output.exists() and "restart_count=0" in output.read_text())
    client.requeue(array, 0)
    client.requeue(array, 0)
    wait_for(lambda: in_queue(array, "PENDING"))
    client.requeue(array, 0)
    wait_for(lambda: "restart_count=1" in output.read_text())
    again = in_queue(array, "RUNNING")
    client.requeue(array, 0)
    assert (again.restarts, in_queue(array, "RUNNING")) == (1, again)
    for restarts in (0, 1):
        assert f"job_id='{array}_7', raw_job_id='{array}', restart_count={restarts}" in output.read_text()


def test_a_requeue_that_slurm_refuses_is_an_error(cluster):
    job_id = start(cluster, "sleep 100", "--no-requeue")
    with pytest.raises(SlurmError, match=rf"^scontrol requeue {job_id}: .*disabled"):
        client.requeue(job_id, 0)


def test_a_node_is_excluded_beside_those_that_were_and_not_while_the_job_runs(cluster):
    """Of an array, only of the one task: the raw id of its last task is also that of the whole array."""
    array = str(submit(cluster, "/dev/null", "sleep 100", "--array=7-8", "--hold", "--exclude=node1"))
    wait_for(lambda: client.show_job(f"{array}_7") is not None)
    ask(cluster, "scontrol", "release", f"{array}_7")  # now the tasks are jobs of their own
    wait_for(lambda: client.show_job(f"{array}_7").state == "RUNNING")
    job = client.show_job(array)
    assert (job.job_id, job.requeue, job.is_batch) == (f"{array}_8", True, True)
    client.exclude_nodes(array, ["node2"])
    assert client.host_names(client.show_job(array).excluded) == ("node1", "node2")
    assert client.host_names(client.show_job(f"{array}_7").excluded) == ("node1",)
    ask(cluster, "scontrol", "release", f"{array}_8")
    running = wait_for(lambda: next((each for each in client.queue([f"{array}_8"]) if each.state == "RUNNING"), None))
    assert running.nodes == ("node0",)
    with pytest.raises(SlurmError, match=rf"scontrol update JobId={array}_8 ExcNodeList=node1,node2,node0: "):
        client.exclude_nodes(array, ["node0"])
    client.cancel(array)


def test_a_cancelled_job_is_not_requeued_while_its_tasks_end(cluster, tmp_path):
    """scontrol requeue would start it again."""
    script = f"srun sh -c 'trap \"\" TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done'"
    job_id = start(cluster, script)
    wait_for((tmp_path / "ready").exists)
    client.cancel(job_id)
    wait_for(lambda: client.show_job(job_id).state == "COMPLETING")
    with pytest.raises(EndingError, match=rf"^job {job_id} is not requeued: it is being ended already"):
        client.requeue(job_id, 0)
    wait_for(lambda: client.show_job(job_id).state == "CANCELLED")
    assert client.show_job(job_id).restarts == 0


def test_a_signal_reaches_tasks_and_is_refused_for_a_waiting_job(cluster, tmp_path):
    script = (
        f"srun sh -c 'trap \"touch {tmp_path}/got; exit\" USR2; touch {tmp_path}/ready; while :; do sleep 0.1; done'"
    )
    job_id = start(cluster, script)
    wait_for((tmp_path / "ready").exists)
    client.signal_job(job_id, "USR2")
    wait_for((tmp_path / "got").exists)
    held = str(submit(cluster, "/dev/null", "true", "--hold"))
    with pytest.raises(SlurmError, match=f"^job {held} is PENDING, and takes no signal"):
        client.signal_job(held, "USR2")


def test_without_slurmctld_every_call_is_an_error_until_it_is_back(cluster):
    job_id = start(cluster, "sleep 100")
    os.kill(slurmctld(cluster), signal.SIGTERM)  # TERM: it saves its state; after KILL it may forget seconds of it
    wait_for(lambda: not processes(cluster.directory, "slurmctld"))
    calls = (client.queue, client.partitions, lambda: client.show_job(job_id), lambda: client.state_of(job_id))
    calls += (
        lambda: client.requeue(job_id, 0),
        lambda: client.cancel(job_id),
        lambda: client.node_address("node0"),
    )
    with ThreadPoolExecutor(len(calls)) as pool:
        errors = [future.exception(client.TIMEOUT_S) for future in [pool.submit(call) for call in calls]]
    start_controller(cluster)  # before the assertions: other tests use the cluster
    assert [type(error) for error in errors] == [NoAnswerError] * len(calls)
    assert all(re.match("Slurm does not answer: (squeue|sinfo|scancel|scontrol) ?.*: .*", str(e)) for e in errors), (
        errors
    )
    client.requeue(job_id, 0)
    assert client.show_job(job_id).restarts == 1


def test_a_slurmctld_that_hangs_is_an_error_after_the_timeout(cluster):
    pid = slurmctld(cluster)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(SlurmError, match=r"^slurmctld does not answer: squeue ran for 1 s$"):
            client.remembered(timeout_s=1.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert client.queue() == []


def test_partitions_and_nodes_are_as_configured(cluster):
    found = {partition.name: partition for partition in client.partitions()}
    assert [name for name, partition in found.items() if partition.is_default] == ["main"]
    main = found["main"]
    assert (main.state, main.nodes, main.max_nodes_per_job, main.max_time_s) == ("up", 3, None, None)
    assert (main.cpus_per_node, main.gpus_per_node) == (cluster.cpus_per_node, cluster.gpus_per_node)
    assert found["high"].max_time_s == 3600
    nodes = client.nodes_of("main")
    assert [(each.name, each.features) for each in nodes] == [(name, "(null)") for name in cluster.nodes]
    assert {each.gres for each in nodes} == {f"gpu:{cluster.gpus_per_node}"}
    wait_for(lambda: all(each.is_usable for each in client.nodes_of("main")))  # a test before has ended slurmctld
    assert client.host_names("node[0-2],x7") == ("node0", "node1", "node2", "x7")
    assert (client.node_address("node1"), client.node_address("node9")) == ("127.0.0.1", None)


def test_only_tasks_of_srun_have_an_allocation(cluster, tmp_path):
    batch = tmp_path / "batch"
    job_id = str(submit(cluster, batch, f"{READ}; srun --label {READ}", "--nodes=2", "--gpus-per-node=2", "-c", "2"))
    wait_for(lambda: client.show_job(job_id).state == "COMPLETED")
    outside, *tasks = batch.read_text().splitlines()
    assert outside == "None"
    for task in tasks:
        rank = task[0]
        assert f"node_rank={rank}, nnodes=2, ntasks=2, node_name='node{rank}', node_list='node[0-1]'" in task
        assert f"job_id='{job_id}', raw_job_id='{job_id}', restart_count=0" in task
        assert "gpus=2" in task
    assert len(tasks) == 2
    assert ask(cluster, "salloc", "--nodes=2", "sh", "-c", READ) == "None\n"
    shell = f'srun --interactive --preserve-env --pty sh -c "{READ}; srun --nodes=2 {READ}"'
    lines = ask(cluster, "salloc", "--nodes=2", "script", "--quiet", "--command", shell, "/dev/null").splitlines()
    assert [(line.endswith("None"), "nnodes=2" in line) for line in lines] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_accounting_has_each_start_of_a_job_that_slurmctld_has_forgotten(accounted, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", accounted.environment["SLURM_CONF"])
    with (accounted.directory / "slurm.conf").open("a") as conf:
        conf.write("MinJobAge=2\n")
    ask(accounted, "scontrol", "reconfigure")
    job_id = start(accounted, "sleep 100")
    client.requeue(job_id, 0)
    wait_for(lambda: in_queue(job_id, "RUNNING"))
    client.cancel(job_id)
    wait_for(lambda: client.show_job(job_id) is None)
    wait_for(lambda: [job.state for job in client.histories([job_id])] == ["REQUEUED", "CANCELLED"])
    assert client.state_of(job_id) == "CANCELLED"
