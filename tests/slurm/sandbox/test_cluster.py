"""The private Slurm starts quickly, is what its configuration says, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.errors import SlurmError
from slurm.sandbox.cluster import local_cluster, read_cluster, start_cluster, stop_cluster
from slurm.sandbox.daemons import node_states
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import ORPHAN, ask, job, naming, running, submit, wait_for

# Some tests run as another user, who may not write coverage data.
pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up rights")
HOSTS = "srun --kill-on-bad-exit=1 sh -c 'echo $(hostname) $SLURM_PROCID $CUDA_VISIBLE_DEVICES'"
# With fewer rights: a cluster, on it a job of two nodes, and whether anything is left.
PROGRAM = """
import os, sys
from pathlib import Path
from slurm.sandbox.cluster import local_cluster, missing_programs
from slurm.sandbox.processes import processes
from tests.helpers import slurm_commands
if "ordinary" in sys.argv:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
with local_cluster(2, accounting=missing_programs(accounting=True) is None) as cluster:
    out = cluster.directory / "out"
    job = slurm_commands.submit(cluster, out, HOSTS, "--nodes=2", "--gpus-per-node=1", "--chdir=/tmp")
    slurm_commands.wait_for(lambda: slurm_commands.job(cluster, job)["JobState"] == "COMPLETED")
    print(cluster.own_hosts, *sorted(out.read_text().splitlines()), sep=",")
    job = slurm_commands.submit(cluster, Path("/dev/null"), "srun sleep 300", "--nodes=2", "--chdir=/tmp")
    slurm_commands.wait_for(lambda: len(processes(cluster.directory, "node1")) > 3)
print(processes(cluster.directory), cluster.directory.exists())
"""


def test_it_is_up_within_10_s_and_down_leaves_no_process_and_no_file(tmp_path):
    began = time.monotonic()
    cluster = start_cluster(3)
    up_s, seconds = time.monotonic() - began, f"3000.{os.getpid()}"
    assert read_cluster(cluster.directory) == cluster
    assert cluster.directory.stat().st_mode & 0o777 == 0o700
    submit(cluster, tmp_path / "out", ORPHAN.format(seconds), "--nodes=2")
    wait_for(lambda: len(naming(seconds)) > 3)  # script, srun, orphan, tasks
    began = time.monotonic()
    stop_cluster(cluster.directory)
    down_s = time.monotonic() - began
    assert naming(seconds) == []
    assert naming(str(cluster.directory)) == []
    assert not cluster.directory.exists()
    assert up_s < 10
    assert down_s < 5


def test_tasks_see_their_own_host_and_the_gpus_they_asked_for(cluster, tmp_path):
    out = tmp_path / "out"
    number = submit(cluster, out, HOSTS, "--nodes=2", "--gpus-per-node=2")
    wait_for(lambda: job(cluster, number)["JobState"] == "COMPLETED")
    assert cluster.own_hosts
    assert sorted(out.read_text().splitlines()) == ["node0 0 0,1", "node1 1 0,1"]


def test_srun_from_outside_reaches_the_nodes(cluster):
    assert sorted(ask(cluster, "srun", "--nodes=3", "hostname").split()) == ["node0", "node1", "node2"]


def test_two_clusters_at_once_are_independent(cluster, tmp_path):
    with local_cluster(1) as other:
        number = submit(other, tmp_path / "out", "sleep 300")
        wait_for(lambda: running(other, number))
        assert ask(cluster, "squeue", "--noheader") == ""
        assert ask(other, "squeue", "--noheader", "--format=%i %N").split() == [str(number), "node0"]
    assert node_states(cluster) == ["idle"] * 3


def test_a_start_that_fails_names_the_daemon_and_leaves_nothing(tmp_path):
    directory = Path("/tmp", f"slurm-fails-{os.getpid()}")
    with pytest.raises(SlurmError, match=r"ended; the end of its log: .*proctrack/nothing"):
        start_cluster(1, directory=directory, proctrack="nothing")
    assert naming(str(directory)) == []
    assert not directory.exists()


def test_an_existing_directory_is_refused_and_kept(tmp_path):
    with pytest.raises(SlurmError, match=r"exists already|is too long"):
        start_cluster(1, directory=tmp_path)
    assert tmp_path.is_dir()


@AS_ROOT
@pytest.mark.parametrize(
    ("rights", "hosts"),
    [("ordinary", "True,node0 0 0,node1 1 0"), ("no namespaces", "False,{0} 0 0,{0} 1 0")],
    ids=lambda given: given.split()[0],
)
def test_it_needs_neither_root_nor_namespaces(rights, hosts):
    fewer = [] if rights == "ordinary" else ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    command = [*fewer, sys.executable, "-c", PROGRAM.replace("HOSTS", repr(HOSTS)), rights]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [hosts.format(os.uname().nodename), "set() False"]


def test_sacct_has_the_end_of_a_job(accounted, tmp_path):
    number = submit(accounted, tmp_path / "out", "exit 7")
    command = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode")
    wait_for(lambda: ask(accounted, *command) == "FAILED|7:0\n")
