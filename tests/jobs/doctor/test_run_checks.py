"""`python -m jobs doctor`: each check is seen to fail, and says how to mend it."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fnet_dist.config.load import load_config
from jobs.doctor import machine
from jobs.doctor import python_env as interpreter
from jobs.doctor import run_checks as examination
from jobs.doctor import slurm_checks as controller
from jobs.doctor.allreduce_check import Ended, all_reduce, check_results
from jobs.doctor.node_job import differences
from jobs.doctor.result import HERE, MISS, OK, WARN, Check, rows_of, show
from jobs.launcher.node_spec import NodeSpec, Topology
from slurm.job_env import Allocation
from slurm.parse import parse_configuration
from slurm.site_config import Site, read_site
from slurm.types import Configuration, Partition

GOOD = {"torch": "2.15.0", "torchvision": "0.29.2", "cuda": None, "gloo": True, "gpus": []}
GPU = {"name": "H100", "bytes": 80 * 2**30}
MAIN = Partition("main", True, "up", 4, None, 7200, 64, 512_000, 8)
CONFIG = """\
Configuration data as of 1764000000
AccountingStorageType   = accounting_storage/slurmdbd
KillWait                = 30 sec
MinJobAge               = 300 sec
PreemptMode             = GANG,SUSPEND
SLURM_VERSION           = 22.05.8
"""


@pytest.fixture
def broken_torch(tmp_path, monkeypatch):
    """A torch before the real one on the path, that cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('raise ImportError("libcudart.so.13: cannot open")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def config(*overrides: str):
    return load_config(["--config", "jobs/node.toml", *overrides], env={})


def cluster(*partitions: Partition, mode: str = "OFF", kill_wait_s: int = 30) -> controller.Cluster:
    return controller.Cluster(Configuration("22.05.8", False, kill_wait_s, 300, (mode,)), partitions)


def test_a_python_that_is_too_old_is_told_before_it_meets_what_it_cannot_read(repository):
    door = (repository / "jobs" / "__main__.py").read_text(encoding="utf-8")
    ast.parse(door, feature_version=(3, 7))
    program = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_module('jobs', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", program, "doctor"], cwd=repository, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: Python 3\.9\.18 at \S+, expected 3\.11 or later; .* `make run`\n", ended.stderr)


@pytest.mark.parametrize(
    ("requirement", "verdict"),
    [("no-such-package>=1", MISS), ("pytest>=999", WARN), ("pytest<2", WARN), ("pytest>=8", OK)],
)
def test_packages_are_there_in_the_releases_that_are_asked_for(requirement, verdict, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(f'[project]\ndependencies = ["{requirement}"]\n')
    check = interpreter.packages(project)
    assert check.verdict == verdict
    assert verdict == OK or requirement in check.found


def test_a_python_without_packages_is_told_so(repository):
    words = [sys.executable, "-S", "-m", "jobs", "doctor", "--json"]
    ended = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [(check["name"], check["verdict"]) for check in json.loads(ended.stdout)] == [
        ("Python", OK),
        ("packages", MISS),
    ]


@pytest.mark.usefixtures("broken_torch")
def test_a_broken_torch_is_missed_without_a_traceback(repository, tmp_path):
    words = [
        sys.executable,
        "-m",
        "jobs",
        "doctor",
        "--json",
        "--data.root",
        str(tmp_path),
        "--run.root",
        str(tmp_path),
    ]
    environment = {**os.environ, "PATH": str(tmp_path)}  # no Slurm there
    ended = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
    checks = {check["name"]: check for check in json.loads(ended.stdout)}
    assert [name for name, check in checks.items() if check["verdict"] == MISS] == ["torch", "data", "all-reduce"]
    assert checks["torch"]["found"] == "import torch, torchvision: ImportError: libcudart.so.13: cannot open"
    assert "2 of 2 ranks here failed: ImportError" in checks["all-reduce"]["found"]
    assert " data fetch --root " in checks["data"]["fix"]
    assert checks["Slurm"]["found"].startswith("not on this machine")


def test_a_torch_that_cannot_exchange_is_missed():
    assert interpreter.torch(GOOD | {"gloo": False}).verdict == MISS


@pytest.mark.parametrize(
    ("gpus", "asked", "driver", "verdict", "words"),
    [
        ([], 0, False, OK, "CPUs for this process"),
        ([GPU, GPU], 2, True, OK, "2 x H100 (80 GiB)"),
        ([GPU], 2, True, MISS, "1 of 2 GPUs asked for"),
        ([GPU, {"error": "no kernel image"}], 0, True, MISS, "1 of 2 GPUs: no kernel image"),
        ([], 0, True, WARN, "torch sees none"),
    ],
)
def test_devices_are_those_that_torch_can_use(gpus, asked, driver, verdict, words, tmp_path):
    if driver:
        (tmp_path / "0000:01:00.0").mkdir()
    [check] = machine.devices(GOOD | {"gpus": gpus}, asked, tmp_path)
    assert check.verdict == verdict
    assert words in check.found


def test_cpus_that_a_task_may_not_use_are_warned_of():
    allocation = Allocation("7", "7", 0, 0, 1, 1, "node0", "node0", 0)
    assert machine.bindings(allocation, 1).verdict == OK
    check = machine.bindings(allocation, 100_000)
    assert (check.verdict, check.found.startswith("node0: ")) == (WARN, True)


def test_whether_nodes_see_the_runs_is_not_guessed_where_slurm_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert controller.shared(Path("/"), None).verdict == WARN
    assert controller.shared(tmp_path / "runs", str(tmp_path)).verdict == OK


def test_data_that_are_whole_are_fine(real_data):
    assert machine.data(config("--data.root", str(real_data))).verdict == OK


def test_a_disk_that_takes_nothing_is_missed_by_writing(tmp_path):
    assert machine.disk(tmp_path / "runs").verdict == OK
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    check = machine.disk(tmp_path / "file" / "runs")
    assert check.verdict == MISS
    assert f"{tmp_path / 'file'} cannot be written: Not a directory" in check.found


@pytest.mark.parametrize(
    ("mode", "key", "verdict", "words"),
    [
        ("auto", "", WARN, "no API key for http://127.0.0.1:9"),
        ("online", "canary" * 8, MISS, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_wandb_lacks_is_told_and_the_key_is_not(mode, key, verdict, words, tmp_path, monkeypatch):
    given = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "HOME": str(tmp_path)}
    for name, value in (given | {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    check = machine.wandb(config("--tracking.wandb", mode))
    assert check.verdict == verdict
    assert words in check.found
    assert "canary" not in f"{check}"


def test_names_that_do_not_resolve_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # Slurm, which may know an address, is not there
    assert machine.node_names(["localhost"]).verdict == OK
    check = machine.node_names(["localhost", "no-such-host.invalid"])
    assert check.verdict == MISS
    assert check.found.startswith("1 of 2 nodes have no address: no-such-host.invalid")
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    assert machine.own_name().verdict == WARN


@pytest.mark.usefixtures("broken_torch")
def test_ranks_that_do_not_start_are_told_and_leave_nothing(tmp_path):
    [check] = all_reduce(NodeSpec(Topology(1, 0, 2)), tmp_path, "cpu")
    assert (check.verdict, check.fix) == (MISS, "mend torch first; with GPUs, NCCL_DEBUG=INFO says more")


def test_without_an_interface_of_that_name_no_door_is_opened_and_others_hear_of_it(tmp_path):
    for node_rank, words in ((0, "network interface 'nosuch0' has no IPv4 address here"), (1, "could open no door")):
        [check] = all_reduce(NodeSpec(Topology(2, node_rank, 1), interface="nosuch0"), tmp_path)
        assert check.verdict == MISS
        assert words in check.found


def told(rank: int, right: bool = True, mb_per_s: float = 500) -> Ended:
    words = {"rank": rank, "world_size": 4, "right": right, "mb_per_s": mb_per_s, "backend": "gloo"}
    return Ended(0, json.dumps(words), "")


@pytest.mark.parametrize(
    ("ended", "verdict", "words"),
    [
        ([told(0), told(1)], OK, "4 ranks, gloo: right sums, 500 MB/s"),
        ([told(0, mb_per_s=12), told(1)], WARN, "12 MB/s; gigabit Ethernet carries 100"),
        ([told(0), told(1, right=False)], MISS, "a wrong sum on ranks [1]"),
        (
            [Ended(-9, "", ""), Ended(1, "", "Traceback\nValueError: no")],
            MISS,
            "2 of 2 ranks here failed: ValueError: no",
        ),
    ],
)
def test_an_exchange_is_judged_by_all_ranks(ended, verdict, words):
    [check] = check_results(ended, leads=True, over_a_network=True)
    assert check.verdict == verdict
    assert words in check.found
    assert len(check_results(ended, leads=False, over_a_network=True)) == (verdict == MISS)


def test_slurms_configuration_is_read_exactly():
    assert parse_configuration(CONFIG) == Configuration("22.05.8", True, 30, 300, ("GANG", "SUSPEND"))
    assert controller.preemption(controller.Cluster(parse_configuration(CONFIG), [])).verdict == WARN


@pytest.mark.parametrize(
    ("mode", "kill_wait_s", "verdict"), [("OFF", 30, OK), ("REQUEUE", 30, OK), ("CANCEL", 30, WARN), ("OFF", 2, WARN)]
)
def test_what_a_preempted_run_may_expect_is_told(mode, kill_wait_s, verdict):
    assert controller.preemption(cluster(mode=mode, kill_wait_s=kill_wait_s)).verdict == verdict


@pytest.mark.parametrize(
    ("partitions", "asked", "verdict"),
    [
        ([MAIN], None, OK),
        ([MAIN], "other,main", MISS),
        ([Partition(**{**vars(MAIN), "is_default": False})], None, WARN),
        ([Partition(**{**vars(MAIN), "state": "down"})], None, MISS),
    ],
)
def test_a_partition_must_be_there_and_take_jobs(partitions, asked, verdict):
    check = controller.partitions(cluster(*partitions), asked)
    assert check.verdict == verdict
    assert "main" in check.found


@pytest.mark.parametrize(
    ("names", "default", "partition"), [(["a", "b"], "b", "b"), (["a"], None, "a"), (["a", "b"], None, None)]
)
def test_a_first_site_file_names_the_partition_and_is_never_overwritten(names, default, partition, tmp_path):
    path = tmp_path / "site.toml"
    there = [Partition(**{**vars(MAIN), "name": name, "is_default": name == default}) for name in names]
    assert "was written" in controller.site(cluster(*there), path).found
    assert read_site(path) == Site(partition=partition)
    path.write_text('partition = "mine"')
    assert controller.site(cluster(*there), path).verdict == OK
    assert path.read_text() == 'partition = "mine"'


def test_what_nodes_found_alike_is_one_row_and_what_differs_names_them(capsys):
    good, bad = Check("disk", OK, "9 GB free"), Check("disk", MISS, "read-only", "another node")
    reports = {"n0": [good], "n1": [bad], "n2": [good], HERE: [Check("Slurm", OK, "22.05.8")]}
    assert rows_of(reports) == [
        (OK, "disk", "n0, n2: 9 GB free"),
        (MISS, "disk", "n1: read-only; fix: another node"),
        (OK, "Slurm", "22.05.8"),
    ]
    assert show(reports, as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[1] == "MISS  disk         n1: read-only; fix: another node"
    assert rows_of({"n0": [good], "n1": [good]}) == [(OK, "disk", "9 GB free")]
    assert show({"n0": [good]}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["node"] == "n0"


def test_nodes_with_different_torches_are_warned_of():
    reports = {node: [Check("torch", OK, version)] for node, version in (("n0", "2.15.0"), ("n1", "2.14.1"))}
    assert [row[:2] for row in rows_of(differences(reports))][2:] == [(WARN, "same torch")] * 2
    assert differences({"n0": reports["n0"]}) == {"n0": reports["n0"]}


def test_a_site_file_that_cannot_be_read_is_missed(monkeypatch, tmp_path, capsys):
    (tmp_path / "site.toml").write_text("partitions = 'x'")
    monkeypatch.setattr(examination, "read_site", lambda: read_site(tmp_path / "site.toml"))
    assert examination.examine([], []) == 1
    assert capsys.readouterr().out.startswith("MISS  site")


def test_sizes_without_a_job_are_refused(repository: Path):
    words = [sys.executable, "-m", "jobs", "doctor", "-N", "2"]
    ended = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "are for --cluster" in ended.stderr
