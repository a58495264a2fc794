"""The nodes of a run connect at the address of the route between them."""

import socket
import subprocess
import sys
from contextlib import closing

import pytest

from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.run_dir import RunDir
from jobs.launcher import node_spec as node_spec
from jobs.launcher import rendezvous as meeting
from jobs.launcher.node_spec import node_spec_in_job
from jobs.launcher.rendezvous import (
    add_meeting,
    check_connection,
    meeting_place,
    open_listening_socket,
    wait_for_attempt,
)
from jobs.launcher.workers import Worker, Workers
from slurm.job_env import read_allocation
from tests.jobs.launcher.test_requeue import TASK


def never():
    return False


def test_node_0_listens_on_the_address_of_the_route_to_the_other_node():
    with closing(open_listening_socket(None, "127.0.0.1")) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with closing(open_listening_socket("lo", "10.255.255.1")) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_interface_without_an_address_is_refused_and_the_others_are_listed():
    with pytest.raises(FnetError, match=r"network interface 'ib9' has no IPv4 address here; this node has .*lo"):
        open_listening_socket("ib9", None)


def test_a_node_that_cannot_reach_node_0_names_host_and_port(monkeypatch):
    monkeypatch.setattr(meeting, "CONNECT_S", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(FnetError) as caught:
        check_connection(f"127.0.0.1:{port}", never)
    assert str(caught.value) == (
        f"{socket.gethostname()} cannot reach node 0 at 127.0.0.1 port {port} within 0.3 s: Connection refused; if the "
        "nodes share another network, name it: `interface` in slurm/site.toml, or GLOO_SOCKET_IFNAME"
    )
    check_connection(f"127.0.0.1:{port}", lambda: True)  # the attempt is over: nobody listens any more


def test_ranks_connect_through_a_private_file_on_one_node_and_through_the_route_to_node_0_on_several():
    with meeting_place(None) as alone, meeting_place("127.0.0.1:999") as several, meeting_place("h:9", "ib0") as chosen:
        assert alone["FNET_INIT_METHOD"].startswith("file:///")
        assert several["FNET_INIT_METHOD"] == "tcp://127.0.0.1:999"
        names = [each["GLOO_SOCKET_IFNAME"] for each in (alone, several, chosen)]
        nccl_names = [each["NCCL_SOCKET_IFNAME"] for each in (alone, several, chosen)]
    assert names == ["lo", "lo", "ib0"]
    assert nccl_names == ["=lo", "=lo", "=ib0"], "NCCL would take eth1 for eth10 too"


def test_an_interface_that_the_user_has_named_stays():
    with meeting_place("h:9", "ib0") as meeting:
        env = add_meeting({"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "", "MASTER_ADDR": "old"}, meeting)
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"], env["MASTER_ADDR"]) == ("eth", "ib0", "h")


def test_a_node_joins_no_attempt_of_another_start_of_its_job(tmp_path):
    """Node 0 of the other start may be cut off and still run."""
    run = RunDir(tmp_path / "r")
    attempt = claim_attempt(run, slurm_job_id="7", slurm_restart_count=0)
    mine = ("7", 0)
    assert wait_for_attempt(run, 0, 0, 5, never, mine) == attempt
    with pytest.raises(FnetError, match="node 0 has begun no attempt"):
        wait_for_attempt(run, 0, 0, 0.3, never, ("7", 1))


def test_a_node_reads_the_shared_disk_once_a_second_while_its_ranks_run():
    looks = []
    ranks = Workers([Worker(0, subprocess.Popen(["sleep", "1.5"]))])
    ranks.watch(lambda: None, lambda: bool(looks.append(1)))
    assert len(looks) == 2


LATE = """
import os, signal
from jobs.launcher.node import signal_handlers
from jobs.launcher.workers import Workers

with signal_handlers(Workers(in_job=True)):
    pass
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    os.kill(os.getpid(), number)
"""


def test_in_a_job_a_warning_that_comes_after_the_end_of_the_run_ends_nothing(repository):
    """By default it would kill Python, on its way out, and the job of a finished run would have failed."""
    assert subprocess.run([sys.executable, "-c", LATE], cwd=repository, timeout=30, check=False).returncode == 0


def test_a_node_name_that_cannot_be_resolved_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(node_spec.client, "node_address", lambda name: None)
    with pytest.raises(FnetError, match=r"cannot resolve no-such-node: .*; ask the site, or name the network"):
        node_spec.address_of_node("no-such-node")


def test_several_slurm_tasks_on_one_node_are_refused():
    with pytest.raises(ConfigError, match=r"srun started 4 tasks on 1 nodes, expected one on each"):
        node_spec_in_job(read_allocation(TASK | {"SLURM_STEP_NUM_TASKS": "4"}), 1, 120, None, None)
