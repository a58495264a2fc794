"""The client refuses hostile arguments before a program starts, and names a program that is missing."""

import pytest

from slurm import client
from slurm.errors import SlurmError

CALLS_BY_ID = {
    "queue": lambda job_id: client.queue([job_id]),
    "show_job": client.show_job,
    "histories": lambda job_id: client.histories([job_id]),
    "state_of": client.state_of,
    "requeue": lambda job_id: client.requeue(job_id, 0),
    "cancel": client.cancel,
    "signal_job": lambda job_id: client.signal_job(job_id, "USR2"),
}


@pytest.fixture(autouse=True)
def no_programs(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("call", CALLS_BY_ID.values(), ids=CALLS_BY_ID)
def test_only_a_job_id_reaches_a_program(call):
    for hostile in (
        "",
        "-a",
        "--user=root",
        "1 2",
        "1;2",
        "1,2",
        "1\n",
        "1_",
        "1_2_3",
        "1_[0-9]",
        "1+0",
        "1.0",
        "\u0661",
    ):
        with pytest.raises(SlurmError, match=r"^'.*' is no job id, such as 123 or 120_3$"):
            call(hostile)


@pytest.mark.parametrize("call", [*CALLS_BY_ID.values(), lambda _: client.partitions(), client.node_address])
def test_a_missing_program_is_named(call):
    with pytest.raises(SlurmError, match=r"^\w+ is not on the PATH; run this where Slurm's programs are$"):
        call("1")


def test_only_node_names_and_signals_reach_a_program():
    for hostile in ("--help", "-h", "a b", "a\n", "a;b", "[0-1]", "$(id)"):
        for call in (client.host_names, client.node_address, lambda name: client.signal_job("1", name)):
            with pytest.raises(SlurmError, match=r"^'.*' is no "):
                call(hostile)


def test_a_node_list_without_ranges_needs_no_program():
    assert (client.host_names(""), client.host_names("node-1.x")) == ((), ("node-1.x",))
