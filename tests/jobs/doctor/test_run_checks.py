"""`fnet doctor`: each check can fail, and says how to fix what it found."""

import ast
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fnet_dist.config.load import load_config
from jobs.doctor import machine, python_env, run_checks, slurm_checks
from jobs.doctor.allreduce_check import TORCH_FIX, all_reduce, check_results
from jobs.doctor.node_job import differences
from jobs.doctor.result import HERE, MISS, OK, WARN, Check, rows_of, show
from jobs.launcher.node_spec import NodeSpec
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
    """Put a torch that cannot be imported before the real one on the path."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('raise ImportError("libcudart.so.13: cannot open")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def config(*overrides: str):
    return load_config(["--config", "jobs/node.toml", *overrides], env={})


def test_a_python_that_is_too_old_ends_with_one_line_and_no_syntax_error(repository):
    source = (repository / "jobs" / "__main__.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))
    program = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_module('jobs', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", program, "doctor"], cwd=repository, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: Python 3\.9\.18 at \S+, expected 3\.11 or later; .* `make run`\n", ended.stderr)


@pytest.mark.parametrize(
    ("requirement", "verdict"),
    [("no-such-package>=1", MISS), ("pytest>=999", WARN), ("pytest<2", WARN), ("pytest>=8,<999", OK)],
)
def test_packages_are_installed_in_the_versions_that_pyproject_allows(requirement, verdict, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(f'[project]\nname = "fnet-dist"\ndependencies = ["{requirement}"]\n')
    check = python_env.packages(project)
    assert check.verdict == verdict
    assert verdict == OK or requirement in check.found


def test_a_python_without_packages_reports_them_as_missing(repository):
    command = [sys.executable, "-S", "-m", "jobs", "doctor", "--json"]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [(check["name"], check["verdict"]) for check in json.loads(ended.stdout)] == [
        ("Python", OK),
        ("packages", MISS),
    ]


@pytest.mark.usefixtures("broken_torch")
def test_a_broken_torch_is_reported_without_a_traceback(repository, tmp_path):
    command = [
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
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
    checks = {check["name"]: check for check in json.loads(ended.stdout)}
    assert [name for name, check in checks.items() if check["verdict"] == MISS] == ["torch", "data", "all-reduce"]
    assert checks["torch"]["found"] == "import torch, torchvision: ImportError: libcudart.so.13: cannot open"
    assert "ranks here failed: ImportError" in checks["all-reduce"]["found"]
    assert " data fetch --root " in checks["data"]["fix"]
    assert checks["Slurm"]["found"].startswith("not on this machine")


def test_a_torch_without_gloo_is_reported():
    assert python_env.torch(GOOD | {"gloo": False}).verdict == MISS


@pytest.mark.parametrize(
    ("gpus", "wanted", "driver", "verdict", "text"),
    [
        ([], 0, False, OK, "CPUs for this process"),
        ([GPU, GPU], 2, True, OK, "2 x H100 (80 GiB)"),
        ([GPU], 2, True, MISS, "1 of 2 GPUs asked for"),
        ([GPU, {"error": "no kernel image"}], 0, True, MISS, "1 of 2 GPUs: no kernel image"),
        ([], 0, True, WARN, "torch sees none"),
    ],
)
def test_devices_are_those_that_torch_can_compute_on(gpus, wanted, driver, verdict, text, tmp_path):
    if driver:
        (tmp_path / "0000:01:00.0").mkdir()
    [check] = machine.devices(GOOD | {"gpus": gpus}, wanted, tmp_path)
    assert check.verdict == verdict
    assert text in check.found


def test_a_task_bound_to_fewer_cpus_gets_a_warning():
    allocation = Allocation("7", "7", 0, 0, 1, 1, "node0", "node0", 0, 1)
    assert machine.bindings(allocation, 1).verdict == OK
    check = machine.bindings(allocation, 100_000)
    assert (check.verdict, check.found.startswith("node0: ")) == (WARN, True)


@pytest.mark.parametrize(("version", "verdict"), [("21.08.8-2", MISS), ("22.05.0", OK), ("26.05.5", OK)])
def test_a_slurm_older_than_22_05_is_reported(version, verdict):
    assert slurm_checks.controller(Configuration(version, False, 30, 300, ("OFF",))).verdict == verdict


def test_a_node_without_scontrol_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    check = slurm_checks.slurm_on_node()
    assert check.verdict == MISS
    assert check.found.startswith("no job can requeue itself: scontrol is not on the PATH")
    assert check.fix.startswith("Slurm's client programs on the nodes")


def test_shared_directories_are_unknown_while_slurm_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_checks.shared(Path("/"), None).verdict == WARN
    assert slurm_checks.shared(tmp_path / "runs", str(tmp_path)).verdict == OK


def test_complete_data_is_ok(real_data):
    assert machine.data(config("--data.root", str(real_data))).verdict == OK


def test_a_directory_that_cannot_be_written_is_reported(tmp_path):
    assert machine.disk(tmp_path / "runs").verdict == OK
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    check = machine.disk(tmp_path / "file" / "runs")
    assert check.verdict == MISS
    assert f"cannot be written: {tmp_path / 'file'}: Not a directory" in check.found


def test_a_full_quota_that_only_a_sync_reports_is_found(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("os.fsync", fsync)
    check = machine.disk(tmp_path)
    assert (check.verdict, check.found) == (MISS, f"{tmp_path} cannot be written: {tmp_path}: Disk quota exceeded")


@pytest.mark.parametrize(
    ("mode", "key", "verdict", "text"),
    [
        ("auto", "", WARN, "no API key for http://127.0.0.1:9"),
        ("online", "canary" * 8, MISS, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_wandb_reports_a_missing_key_or_server_and_never_the_key(mode, key, verdict, text, tmp_path, monkeypatch):
    given = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "HOME": str(tmp_path)}
    for name, value in (given | {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    check = machine.wandb(config("--tracking.wandb", mode))
    assert check.verdict == verdict
    assert text in check.found
    assert "canary" not in f"{check}"


def test_names_that_do_not_resolve_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # Slurm, which may know an address, is not there
    assert machine.node_names(["localhost"]).verdict == OK
    check = machine.node_names(["localhost", "no-such-host.invalid"])
    assert check.verdict == MISS
    assert check.found.startswith("1 of 2 nodes have no address: no-such-host.invalid")
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    assert machine.own_name().verdict == WARN


@pytest.mark.usefixtures("broken_torch")
def test_ranks_that_do_not_start_are_reported(tmp_path):
    [check] = all_reduce(NodeSpec(1, 0, 2), tmp_path, "cpu")
    assert (check.verdict, check.fix) == (MISS, TORCH_FIX)


def test_an_unknown_interface_on_node_0_is_reported_by_all_nodes(tmp_path):
    for node_rank, text in (
        (0, "network interface 'nosuch0' has no IPv4 address here"),
        (1, "could not open a listening socket"),
    ):
        [check] = all_reduce(NodeSpec(2, node_rank, 1, interface="nosuch0"), tmp_path)
        assert check.verdict == MISS
        assert text in check.found


def summed(rank: int, right: bool = True, mb_per_s: float = 500) -> str:
    result = {"rank": rank, "world_size": 4, "right": right, "mb_per_s": mb_per_s, "backend": "gloo"}
    return f"a warning of torch\n{json.dumps(result)}\nanother at exit\n"


@pytest.mark.parametrize(
    ("exit_code", "output", "verdict", "text"),
    [
        (0, summed(0) + summed(1), OK, "4 ranks, gloo: right sums, 500 MB/s"),
        (0, summed(0, mb_per_s=12) + summed(1), WARN, "12 MB/s; gigabit Ethernet carries 100"),
        (0, summed(0) + summed(1, right=False), MISS, "a wrong sum on ranks [1]"),
        (1, summed(0) + "Traceback\nValueError: no", MISS, "ranks here failed: ValueError: no"),
    ],
)
def test_an_all_reduce_is_ok_only_if_all_ranks_are(exit_code, output, verdict, text):
    [check] = check_results(exit_code, output, reports_speed=True, over_a_network=True)
    assert check.verdict == verdict
    assert text in check.found
    others = check_results(exit_code, output, reports_speed=False, over_a_network=True)
    assert len(others) == (verdict == MISS)


def test_slurms_configuration_is_read_exactly():
    assert parse_configuration(CONFIG) == Configuration("22.05.8", True, 30, 300, ("GANG", "SUSPEND"))
    assert slurm_checks.preemption(parse_configuration(CONFIG)).verdict == WARN


@pytest.mark.parametrize(
    ("mode", "kill_wait_s", "verdict"), [("OFF", 30, OK), ("REQUEUE", 30, OK), ("CANCEL", 30, WARN), ("OFF", 2, WARN)]
)
def test_a_preemption_that_can_lose_steps_or_end_the_run_gets_a_warning(mode, kill_wait_s, verdict):
    assert slurm_checks.preemption(Configuration("22.05.8", False, kill_wait_s, 300, (mode,))).verdict == verdict


@pytest.mark.parametrize(
    ("partitions", "wanted", "verdict"),
    [
        ([MAIN], None, OK),
        ([MAIN], "other,main", MISS),
        ([Partition(**{**vars(MAIN), "is_default": False})], None, WARN),
        ([Partition(**{**vars(MAIN), "state": "down"})], None, MISS),
    ],
)
def test_a_partition_must_exist_and_accept_jobs(partitions, wanted, verdict):
    check = slurm_checks.partitions(partitions, wanted)
    assert check.verdict == verdict
    assert "main" in check.found


@pytest.mark.parametrize(
    ("names", "default", "partition"), [(["a", "b"], "b", "b"), (["a"], None, "a"), (["a", "b"], None, None)]
)
def test_a_first_site_file_names_the_partition_and_is_never_overwritten(names, default, partition, tmp_path):
    path = tmp_path / "site.toml"
    partitions = [Partition(**{**vars(MAIN), "name": name, "is_default": name == default}) for name in names]
    assert "was written" in slurm_checks.site(partitions, path).found
    assert read_site(path) == Site(partition=partition)
    path.write_text('partition = "mine"')
    assert slurm_checks.site(partitions, path).verdict == OK
    assert path.read_text() == 'partition = "mine"'


def test_equal_results_of_nodes_share_a_row_and_others_name_the_nodes(capsys):
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


def test_nodes_with_different_torch_versions_get_a_warning():
    reports = {node: [Check("torch", OK, version)] for node, version in (("n0", "2.15.0"), ("n1", "2.14.1"))}
    assert [row[:2] for row in rows_of(differences(reports))][2:] == [(WARN, "same torch")] * 2
    assert differences({"n0": reports["n0"]}) == {"n0": reports["n0"]}


def test_a_site_file_that_cannot_be_read_is_reported(monkeypatch, tmp_path, capsys):
    (tmp_path / "site.toml").write_text("partitions = 'x'")
    monkeypatch.setattr(run_checks, "read_site", lambda: read_site(tmp_path / "site.toml"))
    assert run_checks.run_checks([], [], "fnet doctor: check (trust 1)") == 1
    assert capsys.readouterr().out.startswith("MISS  site")


def test_job_sizes_without_cluster_are_refused(repository: Path):
    command = [sys.executable, "-m", "jobs", "doctor", "-N", "2"]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "are for --cluster" in ended.stderr
