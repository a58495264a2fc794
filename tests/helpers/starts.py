"""Make started and ended runs without training: for tests of what a start does with them."""

from random import Random

import pytest

from fnet_dist.checkpoint.resume import check_run, choose_run, start_attempt
from fnet_dist.checkpoint.storage import save_checkpoint
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import read_json, write_json
from tests.helpers.checkpoint_faults import make_content
from tests.helpers.config import FashionConfig


def settings(root, resume="auto", **sections):
    run = {"name": "r", "root": str(root), **sections.pop("run", {})}
    checkpoint = {"resume": str(resume)}
    return FashionConfig.model_validate(
        {"run": run, "data": {"dataset": "synthetic"}, "checkpoint": checkpoint, **sections}
    )


def launch(launch_id, restart_count=1, launched_at=0.0):
    """Return a rank that torchrun's launch `launch_id` has restarted."""
    return LaunchEnv(launch_id=launch_id, restart_count=restart_count, launched_at=launched_at)


def begin(config, launch_id=None):
    """Start and end an attempt; return the config it trained, and its run."""
    run = choose_run(config, launch(launch_id))
    config, attempt = start_attempt(config, run, launch_id=launch_id, world_size=1)
    end_attempt(attempt, "crash", 0, 1)
    return config, attempt.run


def save(run, *steps):
    """Save checkpoints of `steps` as the run itself does; return the last one's path."""
    for step in steps:
        content = make_content(step, Random(step), read_json(run.manifest)["id"])
        save_checkpoint(run, content, 1, lambda: None)
    return run.checkpoint(steps[-1])


def leave(config, status="finished", *, launch_id=None, steps=()):
    """Make a run that trained one step and ended with `status`."""
    _, run = begin(config, launch_id)
    metrics_log.append(run.metrics_log, [{"kind": "train", "step": 1, "attempt": 1}])
    if steps:
        save(run, *steps)
    write_json(run.outcome, {"status": status, "step": 1, "reason": "signal_term", "launch_id": launch_id})
    return run


def refusal(config):
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    return text
