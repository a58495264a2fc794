"""WANDB_* and FNET_DATA as settings: they override the job file; the command line overrides them; ranks get them."""

import json

import pytest

from fnet_dist.config.environment import ENVIRONMENT, environment_of
from fnet_dist.config.load import dump_config
from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.run_dir import RunDir
from jobs.launcher.node_spec import NodeSpec, Topology
from jobs.launcher.workers import _environment
from tests.helpers.job_files import load, write


def test_wandb_variables_override_the_job_file_and_the_command_line_overrides_them(tmp_path):
    job = write(tmp_path / "job.toml", "tracking.wandb = 'offline'\ntracking.project = 'file'")
    env = {"WANDB_MODE": "online", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"}
    told = load(job, "--tracking.project", "line", env=env).tracking
    assert (told.wandb, told.project, told.entity, told.name, told.group) == ("online", "line", "e", "n", "g")
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


def test_the_launchers_variables_give_a_rank_the_launchers_settings(job):
    """The environment overrides config.json: it must not undo the launcher's command line."""
    env = {"FNET_DATA": "/env", "WANDB_MODE": "online", "WANDB_ENTITY": "e"}
    launcher = load(job, "--data.root", "/line", "--tracking.wandb", "offline", "--tracking.entity", "none", env=env)
    assert launcher.tracking.entity is None
    told = environment_of(launcher)
    assert {*told} == {*ENVIRONMENT} - {"WANDB_ENTITY", "WANDB_RUN_GROUP"}
    write(job.with_name("config.json"), json.dumps(dump_config(launcher)))
    assert load(job.with_name("config.json"), env=told) == launcher


def test_a_rank_gets_the_settings_of_its_own_nodes_launcher(job, tmp_path, monkeypatch):
    """config.json is node 0's; another node's data may be elsewhere, and a command line overrides a variable."""
    env = {"FNET_DATA": "/env", "WANDB_ENTITY": "e", "WANDB_MODE": "online", "WANDB_API_KEY": "k"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    config = load(job, "--data.root", "/line", "--tracking.entity", "none", env=env)
    told = _environment(Attempt(RunDir(tmp_path), 1), config, NodeSpec(Topology(2, 1, 1), deadline=9.5), 1, 0, {}, None)
    assert (told["FNET_DATA"], told["WANDB_MODE"], told["WANDB_API_KEY"]) == ("/line", "online", "k")
    assert told["FNET_DEADLINE"] == "9.5"
    assert "WANDB_ENTITY" not in told
