"""Promise 2: a run that was stopped, and went on from what was saved, is the run that was never stopped.

At the same world size to the bit, whatever the optimizer; at others on the same samples, with the same losses. The
ranks are real gloo processes, the checkpoints are on disk.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fnet_dist.checkpoint.state import encode, snapshot_state
from fnet_dist.checkpoint.storage import save_checkpoint
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.loss import build_loss
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.run_dir import RunDir, open_manifest, read_json
from fnet_dist.run.stop import StopFlag, StoppedError
from fnet_dist.training.setup import TrainTestData, claim_run, restore_checkpoint
from fnet_dist.training.trainer import fit
from jobs.verification.compare_runs import gaps, run_differences
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.promises.test_same_training_at_any_world_size import CLASS_WEIGHTS, Recorded, build, step_losses

pytestmark = pytest.mark.processes

# At the same world size: each case is trained once undisturbed and once with three stops.
TRAIN_COUNT, TEST_COUNT, EPOCHS = 200, 20, 2
HARD = {"model": {"dropout": 0.25}, "parallel": {"grad_accum_steps": 3}}
CASES: dict[str, dict[str, Any]] = {
    "adam": {**HARD, "optim": {"max_grad_norm": 0.5}, "schedule": {"name": "cosine", "warmup_steps": 5}},
    "adamw": {**HARD, "optim": {"name": "adamw"}},
    "sgd": {**HARD, "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "loss": {"class_weights": CLASS_WEIGHTS}},
    "adagrad": {**HARD, "optim": {"name": "adagrad"}},
    "adadelta": {**HARD, "optim": {"name": "adadelta"}},
    # Two steps an epoch: each is twenty passes, and as slow as all that the others do.
    "lbfgs": {"model": HARD["model"], "optim": {"name": "lbfgs", "lr": 0.1}, "data": {"global_batch_size": 100}},
    "bf16": {**HARD, "parallel": {"grad_accum_steps": 3, "precision": "bf16"}},
    "bf16_gradients": {**HARD, "parallel": {"grad_accum_steps": 3, "numerics": "bf16_gradients"}},
}

# At other world sizes, in float64; an epoch has 11 steps, the last of two samples, which four ranks cannot share.
WORLD_SIZES, STEPS, BATCHES = (2, 1, 4, 2), 200, 10
QUARTER = STEPS // len(WORLD_SIZES)  # ends in the middle of an epoch each time
ELASTIC = {
    "optim": {"name": "adam", "lr": 3e-3, "max_grad_norm": 0.5},
    "loss": {"class_weights": CLASS_WEIGHTS},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}


def config_of(folder: Path, name: str) -> Config:
    data = {"dataset": "synthetic", "global_batch_size": 16, **CASES[name].get("data", {})}
    run = {"root": str(folder), "name": name, "epochs": EPOCHS}
    return Config.model_validate({**CASES[name], "run": run, "data": data, "tracking": {"wandb": "disabled"}})


def steps_per_epoch(name: str) -> int:
    return -(-TRAIN_COUNT // config_of(Path(), name).data.global_batch_size)


class Asking(RandomDataset):
    """Its rank is asked to stop when batch number `at` is read, counted from 1."""

    def __init__(self, config: Any, count: int, stop: StopFlag, at: int | None) -> None:
        super().__init__(config, count, Fault("none"))
        self.stop, self.at, self.batches_read = stop, at, 0

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.batches_read += 1
        if self.batches_read == self.at:
            self.stop.reason = "signal_term"
        return super().batch(indices)


def train(group: Group, config: Config, in_step: int | None = None, in_evaluation: bool = False) -> None:
    """A start as trainer.train makes it; rank 1 alone is asked to stop in the start's `in_step`th step, if any."""
    stop, last = StopFlag(), group.rank == 1
    at = (in_step - 1) * config.parallel.grad_accum_steps + 1 if last and in_step else None
    data = TrainTestData(
        Asking(config.data, TRAIN_COUNT, stop, at),
        Asking(config.data, TEST_COUNT, stop, 1 if last and in_evaluation else None),
    )
    config, attempt = claim_run(config, group, LaunchEnv(), data)
    progress = RunOutcomeWriter(attempt if group.is_rank0 else None)
    with Watchdog(group.rank, 60, print) as guard, record_outcome(progress):
        fit(config, group, attempt, data, progress, stop, guard)


def every_optimizer(group: Group, folder: Path) -> None:
    """Every case undisturbed; then stopped in the first epoch, in its evaluation and in the second epoch."""
    for name in CASES:
        train(group, config_of(folder / "undisturbed", name))
        half, stopped = steps_per_epoch(name) // 2, config_of(folder / "stopped", name)
        with patch("fnet_dist.training.window.WINDOW_S", 0):  # a window is one step, and ends where it was asked to
            for ask in ({"in_step": half}, {"in_evaluation": True}, {"in_step": half}):
                with suppress(StoppedError):
                    train(group, stopped, **ask)
        train(group, stopped)


def elastic(group: Group, folder: Path, last: int) -> None:
    """Go on in float64 from the checkpoint in `folder`, if there is one, to step `last`, and save there."""
    config, dataset, run = Config.model_validate(ELASTIC), Recorded(64 * BATCHES + 2), RunDir(folder)
    torch.manual_seed(0 if not run.checkpoints.exists() else last)  # what is restored owes nothing to where it began
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10), nn.LogSoftmax(dim=1)).double()
    parts = build(group, config, dataset, model, build_loss(config.loss))
    per_epoch = parts.sampler.steps_per_epoch
    restore_checkpoint(parts.state, run, group, per_epoch)
    losses = list(step_losses(parts, dataset, last))
    if group.is_rank0:
        content = encode(snapshot_state(parts.state, read_json(run.manifest)["id"], per_epoch))
        save_checkpoint(run, content, 1, lambda: None)
    torch.save({"losses": losses, "asked": dataset.asked}, folder / f"to_{last}_rank_{group.rank}")


def at_two_ranks(group: Group, folder: Path) -> None:
    every_optimizer(group, folder)
    elastic(group, folder / "resized", QUARTER)


def at_one_rank(group: Group, folder: Path) -> None:
    elastic(group, folder / "alone", STEPS)
    elastic(group, folder / "resized", 2 * QUARTER)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything has been trained: undisturbed/, stopped/, alone/ and resized/."""
    folder = tmp_path_factory.mktemp("stopping")
    for name in ("alone", "resized"):
        (folder / name).mkdir()
        open_manifest(RunDir(folder / name))
    run_ranks(at_two_ranks, 2, folder)
    run_ranks(at_one_rank, 1, folder)
    run_ranks(elastic, 4, folder / "resized", 3 * QUARTER)
    run_ranks(elastic, 2, folder / "resized", STEPS)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_gone_on_with_at_the_same_world_size_it_ends_the_same_to_the_bit(trained: Path, name: str) -> None:
    undisturbed, stopped = (RunDir(trained / kind / name) for kind in ("undisturbed", "stopped"))
    ends = [read_json(path) for path in sorted(stopped.attempts.glob("*/end.json"))]
    first, second = steps_per_epoch(name), 2 * steps_per_epoch(name)
    assert [end["step"] for end in ends] == [first // 2, first, first + first // 2, second]
    assert [end["reason"] for end in ends] == ["signal_term"] * 3 + ["finished"]
    assert run_differences(undisturbed, stopped) == []
    assert gaps(stopped) == []


def steps_of(folder: Path, last: int, world_size: int) -> tuple[list[float], list[set[int]]]:
    """Loss and samples, over all ranks, of each step that the start up to step `last` took."""
    ranks = [torch.load(folder / f"to_{last}_rank_{rank}") for rank in range(world_size)]
    steps = zip(*(rank["asked"] for rank in ranks), strict=True)
    return ranks[0]["losses"], [{index for share in shares for index in share} for shares in steps]


def test_from_two_ranks_to_one_to_four_to_two_it_takes_the_same_samples_with_the_same_losses(trained: Path) -> None:
    losses, samples = steps_of(trained / "alone", STEPS, 1)
    assert len(losses) == len(samples) == STEPS
    assert {len(batch) for batch in samples} == {64, 2}
    resized = [steps_of(trained / "resized", (n + 1) * QUARTER, size) for n, size in enumerate(WORLD_SIZES)]
    assert [len(start[0]) for start in resized] == [QUARTER] * 4
    assert [batch for start in resized for batch in start[1]] == samples
    torch.testing.assert_close(
        torch.tensor([loss for start in resized for loss in start[0]], dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )
    assert sum(losses[-10:]) < sum(losses[:10])
