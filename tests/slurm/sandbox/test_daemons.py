"""The private Slurm reacts to faults as a real cluster does."""

import os

import pytest

from slurm.sandbox.cluster import local_cluster
from slurm.sandbox.daemons import node_states, start_controller, start_node
from tests.helpers.slurm_commands import (
    ORPHAN,
    ask,
    job,
    kill_controller,
    kill_node,
    kill_slurmd,
    naming,
    running,
    start_slurmd,
    stepds,
    submit,
    wait_for,
    wait_until_saved,
)

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]


@pytest.mark.soak
def test_a_job_of_a_killed_node_is_requeued_and_leaves_no_process(tmp_path):
    with local_cluster(3) as cluster:
        seconds = f"4000.{os.getpid()}"
        number = submit(cluster, tmp_path / "out", ORPHAN.format(seconds), "--nodes=2")
        wait_for(lambda: len(naming(seconds)) > 3)
        kill_node(cluster, "node0")
        assert stepds(cluster, "node0", number) == {}
        assert [*stepds(cluster, "node1", number)] == ["0"]
        wait_for(lambda: int(job(cluster, number)["Restarts"]) == 1, 40)
        assert ask(cluster, "sinfo", "--noheader", "--nodes=node0", "--partition=main", "--format=%T") == "down*\n"
        start_node(cluster, "node0")
        wait_for(lambda: node_states(cluster)[0] == "idle")


def test_a_killed_slurmctld_comes_back_with_its_jobs(cluster, tmp_path):
    number = submit(cluster, tmp_path / "out", "srun sleep 300", "--nodes=3")
    wait_for(lambda: len(stepds(cluster, "node2", number)) == 1)
    wait_until_saved(cluster, number)
    before = [stepds(cluster, node, number) for node in cluster.nodes]
    kill_controller(cluster)
    start_controller(cluster)
    wait_for(lambda: running(cluster, number))
    wait_for(lambda: node_states(cluster) == ["mixed"] * 3)  # they have reported what runs
    assert [stepds(cluster, node, number) for node in cluster.nodes] == before
    assert {*before[0]} == {"batch", "0"}
    ask(cluster, "scancel", str(number))
    wait_for(lambda: node_states(cluster) == ["idle"] * 3)


def test_jobs_continue_while_their_slurmd_is_killed(cluster, tmp_path):
    go_on = tmp_path / "go-on"
    number = submit(cluster, tmp_path / "out", f"srun sh -c 'until [ -e {go_on} ]; do sleep 0.1; done'")
    wait_for(lambda: len(stepds(cluster, "node0", number)) == 2)
    kill_slurmd(cluster, "node0")
    go_on.touch()
    wait_for(lambda: stepds(cluster, "node0", number) == {})
    start_slurmd(cluster, "node0")
    wait_for(lambda: job(cluster, number)["JobState"] == "COMPLETED")
    assert job(cluster, number)["Restarts"] == "0"
    wait_for(lambda: node_states(cluster) == ["idle"] * 3)


def test_jobs_of_low_are_requeued_for_jobs_of_high(cluster, tmp_path):
    low = submit(cluster, tmp_path / "low", "sleep 300", "--partition=low", "--nodes=3", "--exclusive")
    wait_for(lambda: running(cluster, low))
    high = submit(cluster, tmp_path / "high", "true", "--partition=high", "--nodes=3", "--exclusive")
    wait_for(lambda: job(cluster, high)["JobState"] == "COMPLETED")
    assert job(cluster, low)["Restarts"] == "1"
    ask(cluster, "scancel", str(low))
    wait_for(lambda: node_states(cluster) == ["idle"] * 3)
