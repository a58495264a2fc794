"""What is refused before a program of Slurm starts, and what is said where there is none."""

import pytest

from slurm import client
from slurm.errors import SlurmError

ASKED_BY_ID = {
    "queue": lambda job_id: client.queue([job_id]),
    "show_job": client.show_job,
    "history": client.history,
    "state_of": client.state_of,
    "requeue": lambda job_id: client.requeue(job_id, 0),
    "cancel": client.cancel,
    "signal_job": lambda job_id: client.signal_job(job_id, "USR2"),
}


@pytest.fixture(autouse=True)
def no_programs(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("ask", ASKED_BY_ID.values(), ids=ASKED_BY_ID)
def test_only_a_job_id_reaches_a_program(ask):
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
            ask(hostile)


@pytest.mark.parametrize("ask", [*ASKED_BY_ID.values(), lambda _: client.partitions(), client.node_address])
def test_a_missing_program_is_named(ask):
    with pytest.raises(SlurmError, match=r"^\w+ is not on the PATH; run this where Slurm's programs are$"):
        ask("1")


def test_only_names_of_nodes_and_signals_reach_a_program():
    for hostile in ("--help", "-h", "a b", "a\n", "a;b", "[0-1]", "$(id)"):
        for ask in (client.host_names, client.node_address, lambda name: client.signal_job("1", name)):
            with pytest.raises(SlurmError, match=r"^'.*' is no "):
                ask(hostile)


def test_a_list_without_ranges_needs_no_program():
    assert (client.host_names(""), client.host_names("node-1.x")) == ((), ("node-1.x",))
