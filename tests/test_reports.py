"""Public bug reports that this package was tried on and that it holds: a row each, where a function shows it.

Those that need processes, files or a Slurm are in the tests of their rooms.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.distributed.launch_env import LaunchEnv, read_launch_env
from fnet_dist.errors import ConfigError
from slurm.job_env import read_allocation
from slurm.parse import parse_history, parse_partitions, parse_queue, parse_shown_job
from slurm.sbatch_options import resolve
from slurm.values import gpus
from tests.helpers.job_files import load, write

SHOWN = """\
JobId={id} JobName=train
   UserId=me(1000) GroupId=domain users(513) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 StartTime=1795526387 EndTime=1795526409 PreemptTime=None
   Partition=main ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[01-03,07] {before}
   Command=(null)
   {after}
"""
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "3", "SLURMD_NODENAME": "node07"}
TASK |= {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[01-03,07]"}


def shown(before: str = "", after: str = "", job_id: str = "116", title: str = "") -> str | None:
    """Return the state of a job as scontrol shows it with more fields `before` and `after` the command."""
    job = parse_shown_job(SHOWN.format(id=job_id + title, before=before, after=after), job_id)
    return job and job.state


def loss_of(folder: Path, content: bytes) -> Any:
    """Return the learning rate of a job file."""
    (folder / "job.toml").write_bytes(content)
    return load(folder / "job.toml").optim.lr


@pytest.mark.parametrize(
    ("report", "found", "expected"),
    [
        ("rocoto#14, galaxy#6194: `Power=` without a value", lambda: shown(after="Power=\n   \n"), "RUNNING"),
        ("a comment with `=` and words of scontrol", lambda: shown(after="Comment=a JobState=FAILED"), "RUNNING"),
        ("jobbergate#722: fields of a newer Slurm", lambda: shown("StepMgrEnabled=Yes SegmentSize=0"), "RUNNING"),
        ("a heterogeneous job", lambda: shown(title=" HetJobId=115 HetJobOffset=1"), "RUNNING"),
        ("the id of a federation", lambda: shown(job_id="134217845"), "RUNNING"),
        ("GRES with sockets", lambda: gpus("gpu:a100:2(S:0-1),tmp:50"), 2),
        ("GRES of MIG", lambda: gpus("gpu:1g.10gb:7(S:0),gpu:a100:3"), 10),
        ("GRES no_consume", lambda: gpus("gpu:no_consume:4"), 4),
        ("a node list with holes and zeros", lambda: read_allocation(TASK).node_list, "node[01-03,07]"),
        ("features that are alternatives", lambda: resolve({"constraint": "a100|h100"}, ()).constraint, "a100|h100"),
        ("an empty queue, history and list of partitions", lambda: [*parse_queue(""), *parse_history("")], []),
        ("no partition at all", lambda: parse_partitions(""), []),
        ("`env -i`", lambda: read_launch_env({}), LaunchEnv()),
    ],
)
def test_it_is_read(report: str, found: Callable[[], object], expected: object) -> None:
    assert found() == expected, report


@pytest.mark.parametrize(
    ("report", "content"),
    [
        ("CRLF", b"[optim]\r\nlr = 0.5\r\n"),
        ("a file without a last line break", b"[optim]\nlr = 0.5"),
        ("a comment beyond ASCII", "# naïve Größe 学習\n[optim]\nlr = 0.5\n".encode()),
    ],
)
def test_a_job_file_is_read(tmp_path: Path, report: str, content: bytes) -> None:
    assert loss_of(tmp_path, content) == 0.5, report


@pytest.mark.parametrize(
    ("report", "content", "message"),
    [
        ("UTF-16", "[optim]\nlr = 0.5\n".encode("utf-16"), "job.toml"),
        ("a key twice", b"[optim]\nlr = 0.5\nlr = 0.1\n", "job.toml"),
        ("a table twice", b"[optim]\n[optim]\n", "job.toml"),
        ("a number as text", b'[optim]\nlr = "0.5"\n', "optim.lr"),
        ("text as a number", b"[run]\nname = 5\n", "run.name"),
        ("a boolean as a number", b"[run]\nepochs = true\n", "run.epochs"),
    ],
)
def test_a_job_file_is_refused_in_one_line(tmp_path: Path, report: str, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loss_of(tmp_path, content)
    assert message in str(caught.value), report
    assert "\n" not in str(caught.value), report


def test_stray_variables_of_another_launcher_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR set but LOCAL_RANK"):
        read_launch_env({"RANK": "0", "MASTER_ADDR": "node0"})
    assert load(write(tmp_path / "job.toml", ""), env={"SLURM_PROCID": "3"}).run.name == "job"
