"""`fnet doctor --cluster` on a real Slurm: every node reports, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jobs.submission.snapshot import take_snapshot
from tests.helpers.slurm_commands import ask, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]


@pytest.fixture
def doctor(cluster, repository, tmp_path):
    """Start doctor in a checkout of its own: on a real cluster it would write slurm/site.toml there."""
    checkout = take_snapshot(repository, tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True, timeout=30)
    runs = checkout / "runs"

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "doctor", "--cluster", "--run.root", "runs", *words],
            cwd=checkout,
            env={**os.environ, **cluster.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.runs, start.site = runs, checkout / "slurm" / "site.toml"
    return start


@pytest.mark.timeout(120)
def test_two_nodes_are_ok_and_all_reduce(doctor):
    with doctor("-N", "2", "--json", "--data.dataset", "synthetic") as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err + out
    checks = json.loads(out)
    assert {check["node"] for check in checks} == {None, "node0", "node1"}
    assert {check["verdict"] for check in checks} == {"OK"}
    [all_reduce] = [check for check in checks if check["name"] == "all-reduce"]
    assert all_reduce["node"] == "node0"
    assert all_reduce["found"].startswith("2 ranks, gloo: right sums, ")
    disks = {check["found"].partition(": ")[0] for check in checks if check["name"] == "disk"}
    assert disks == {str(doctor.runs)}, "nodes check where the runs are, not where their copy of the code is"
    assert not doctor.site.exists(), "partitions of a private Slurm would refuse the next job on the real one"
    assert [*(doctor.runs / "doctor").iterdir()] == []


@pytest.mark.timeout(120)
def test_missing_gpus_and_data_are_reported_with_the_names_of_the_nodes(doctor):
    with doctor("-N", "2", "--gpus-per-node", "1", "--data.root", "/nowhere") as process:
        out, err = process.communicate(timeout=100)
    missed = [line.split() for line in out.splitlines() if line.startswith("MISS")]
    assert process.returncode == 1, err + out
    assert [(words[1], words[2:4]) for words in missed] == [
        (name, ["node0,", "node1:"]) for name in ("devices", "data")
    ]
    assert "2 ranks, gloo: right sums" in out
    assert "the output of the nodes is in " in err


@pytest.mark.timeout(60)
def test_ctrl_c_cancels_the_job(doctor, cluster):
    ask(cluster, "scontrol", "update", "NodeName=ALL", "State=DRAIN", "Reason=test")
    try:
        with doctor() as process:
            line = process.stderr.readline()
            assert " is pending (" in line
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        assert process.returncode == 130
        wait_for(lambda: line.split()[1] not in ask(cluster, "squeue", "--noheader", "--format=%i"))
    finally:
        ask(cluster, "scontrol", "update", "NodeName=ALL", "State=RESUME")
