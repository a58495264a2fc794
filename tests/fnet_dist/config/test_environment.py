"""WANDB_* and FNET_DATA as settings: above the job file, below the command line; what a launcher gives its ranks."""

import json
import subprocess
import sys

import pytest

from fnet_dist.config.load import dump_config, load_config
from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.run_dir import RunDir
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.workers import PROGRAM, _arguments, _common_environment, _rank_environment
from tests.helpers.job_files import load, write


def test_wandb_variables_override_the_job_file_and_the_command_line_overrides_them(tmp_path):
    job = write(tmp_path / "job.toml", "tracking.wandb = 'offline'\ntracking.project = 'file'")
    env = {"WANDB_MODE": "online", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"}
    result = load(job, "--tracking.project", "line", env=env).tracking
    assert (result.wandb, result.project, result.entity, result.name, result.group) == ("online", "line", "e", "n", "g")
    assert load(job).tracking.wandb == "offline"


@pytest.mark.parametrize("mode", ["shared", "dryrun"])
def test_an_unsupported_wandb_mode_is_refused_and_its_variable_named(job, mode):
    """`shared` has no offline form, and its server loses rows."""
    with pytest.raises(ConfigError) as caught:
        load(job, env={"WANDB_MODE": mode})
    assert str(caught.value).startswith(
        f"tracking.wandb: got '{mode}', expected one of auto, online, offline, disabled"
    )
    assert str(caught.value).endswith("; fix: the variable WANDB_MODE, which sets it")
    assert load(job, "--tracking.wandb", "offline", env={"WANDB_MODE": mode}).tracking.wandb == "offline"


def test_a_rank_of_the_launcher_reads_config_json_whatever_the_environment_says(job, tmp_path, monkeypatch):
    """config.json is node 0's; the data of another node may lie elsewhere: each launcher passes its own root."""
    env = {"FNET_DATA": "/env", "WANDB_ENTITY": "e", "WANDB_MODE": "online", "WANDB_API_KEY": "k"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    node0 = load(job, "--tracking.wandb", "offline", "--tracking.entity", "none", env=env | {"FNET_DATA": "/node0"})
    here = load(job, "--data.root", "/line", "--tracking.wandb", "offline", env=env)
    attempt = Attempt(RunDir(tmp_path), 1)
    write(attempt.run.config, json.dumps(dump_config(node0)))
    assert (sys.executable, "-m", "fnet_dist.train") == PROGRAM
    rank = load_config(_arguments(attempt, here), env={})
    assert dump_config(rank) == dump_config(node0) | {"data": dump_config(here)["data"]}
    assert (rank.data.root, rank.tracking.entity, rank.tracking.wandb) == ("/line", None, "offline")


def test_a_rank_gets_the_users_deadline_and_key_and_imports_the_launchers_code(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("FNET_DEADLINE", "9.5")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of another launcher")
    spec = NodeSpec(2, 1, 1)
    result = _common_environment(spec) | _rank_environment(Attempt(RunDir(tmp_path), 1), spec, 0)
    assert (result["WANDB_API_KEY"], result["FNET_DEADLINE"], result["RANK"]) == ("k", "9.5", "1")
    assert "TORCHELASTIC_RUN_ID" not in result
    (tmp_path / "fnet_dist").mkdir()
    (tmp_path / "fnet_dist" / "__init__.py").write_text("raise ImportError('another checkout')")
    program = [sys.executable, "-m", "fnet_dist.train", "--help"]
    assert subprocess.run(program, cwd=tmp_path, env=result, capture_output=True).returncode == 0
    del result["PYTHONSAFEPATH"]
    assert b"another checkout" in subprocess.run(program, cwd=tmp_path, env=result, capture_output=True).stderr
