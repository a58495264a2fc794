"""`fnet cluster` starts, shows and stops a private Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.sandbox.cluster import read_cluster
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import kill_controller, naming, running, submit, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("slurm_programs")]


def test_up_starts_a_cluster_once_status_shows_it_and_down_removes_it(tmp_path):
    place = Path("/tmp", f"verb-{os.getpid()}")
    place.mkdir()

    def jobs_cluster(*words):
        ended = subprocess.run(
            [sys.executable, "-m", "jobs", "cluster", *words],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(place)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return ended.returncode, ended.stdout, ended.stderr

    try:
        assert jobs_cluster("status") == (1, "", "error: no cluster is up; start one: fnet cluster up\n")
        code, out, _ = jobs_cluster("up", "--nodes=2")
        assert (code, out.splitlines()[0]) == (0, "up: node0, node1")
        directory = next(place.iterdir())
        assert f"export SLURM_CONF={directory}/slurm.conf\n" in out
        cluster = read_cluster(directory)
        number = submit(cluster, tmp_path / "out", "sleep 300")
        wait_for(lambda: running(cluster, number))
        assert jobs_cluster("up")[1].splitlines()[0] == "up already: node0, node1"
        _, out, _ = jobs_cluster("status")
        assert [line.split()[0] for line in out.splitlines()] == ["NODELIST", "node0", "node1", "JOBID", str(number)]
        kill_controller(cluster)
        code, out, err = jobs_cluster("up")
        assert (code, out) == (1, "")
        assert "slurmctld died; fnet cluster down, then up" in err
    finally:
        code, out, _ = jobs_cluster("down")
    assert (code, out) == (0, "down: no process and no file of it is left; unset SLURM_CONF\n")
    assert [*place.iterdir()] == []
    assert naming(str(place)) == []
    place.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a program")
def test_missing_programs_are_named_with_the_command_that_installs_them():
    program = "from slurm.sandbox.cluster import missing_programs; print(missing_programs())"
    hidden = "for name in slurmctld munged; do mount --bind /dev/null $(command -v $name) || exit; done"
    command = ["unshare", "--mount", "sh", "-c", f'{hidden}; exec "$@"', "sh", sys.executable, "-c", program]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout
    packages = "apt-get install --no-install-recommends slurmctld munge"
    assert out == f"slurmctld, munged are missing; on Debian: {packages}\n"
