"""Evaluations within an epoch, the best checkpoint, and a run that ends when nothing gets better."""

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json
from tests.helpers.processes import FAULTY, start

pytestmark = pytest.mark.processes

STEPS = 9  # an epoch


def train(tmp_path, *words):
    """Train one rank without learning: each evaluation has the same accuracy."""
    job = tmp_path / "job.toml"
    job.write_text(
        f'run = {{root = "{tmp_path}/runs", epochs = 3, evaluate_every_steps = 4}}\ndata = {{global_batch_size = 16}}\n'
        'optim = {name = "sgd", lr = 1e-12}\ncheckpoint = {keep_best = true, every_steps = 3}\n'
        'parallel = {device = "cpu"}\ntracking = {wandb = "disabled"}\n'
    )
    with start(*FAULTY, "none", "--config", str(job), *words) as rank:
        ended = rank.end()
    assert ended.code == 0, ended.err
    return RunDir(tmp_path / "runs" / "job"), ended


def evaluated(run):
    return [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "eval"]


def test_patience_ends_the_run_and_more_patience_trains_on(tmp_path):
    run, ended = train(tmp_path, "--run.patience", "3")
    assert evaluated(run) == [4, 8, 12, 16]  # the first is the best, three are not better
    assert (read_json(run.outcome)["status"], read_json(run.outcome)["reason"]) == ("finished", "patience")
    assert read_json(run.outcome)["step"] == 16
    best = read_json(run.best)
    assert (best["step"], best["monitor"]) == (4, "accuracy")
    assert 4 in checkpoint_steps(run), "kept, although two newer ones are"
    assert run.best_model.read_bytes() == (run.checkpoint(4) / "model.safetensors").read_bytes()
    assert "best           accuracy" in ended.out

    run, ended = train(tmp_path, "--run.patience", "3")
    assert "finished before" in ended.out
    run, _ = train(tmp_path, "--run.patience", "none")
    assert evaluated(run) == [4, 8, 12, 16, 20, 24, 27]  # and at the end
    assert (read_json(run.outcome)["reason"], read_json(run.outcome)["step"]) == ("finished", 3 * STEPS)
    assert [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"] == [*range(1, 28)]
