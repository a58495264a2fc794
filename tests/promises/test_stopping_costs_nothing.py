"""Promise: a run that is stopped and resumed from its checkpoint equals a run that was never stopped.

At the same world size it is bit-identical, with every optimizer; at other world sizes it trains on the same samples
with the same losses. The ranks are real gloo processes, the checkpoints are on disk.
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
from fnet_dist.distributed.process_group import Group
from fnet_dist.run.run_dir import RunDir, open_manifest, read_json
from fnet_dist.run.stop import StopFlag, StoppedError
from fnet_dist.training.setup import TrainTestData, restore_checkpoint
from jobs.verification.compare_runs import gaps, run_differences
from tests.helpers.config import FashionConfig
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.helpers.training import classifier_loss, train_in_group
from tests.promises.test_same_training_at_any_world_size import CLASS_WEIGHTS, RecordingDataset, build, step_losses

pytestmark = pytest.mark.processes

# At the same world size: each case is trained once without and once with three stops.
TRAIN_COUNT, TEST_COUNT, EPOCHS = 200, 20, 2
COMMON = {"model": {"dropout": 0.25}, "parallel": {"grad_accum_steps": 3}}
CASES: dict[str, dict[str, Any]] = {
    "adam": {**COMMON, "optim": {"max_grad_norm": 0.5}, "schedule": {"name": "cosine", "warmup_steps": 5}},
    "adamw": {**COMMON, "optim": {"name": "adamw"}},
    "sgd": {**COMMON, "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "loss": {"class_weights": CLASS_WEIGHTS}},
    "radam": {**COMMON, "optim": {"name": "radam", "betas": [0.8, 0.95]}},
    "nadam": {**COMMON, "optim": {"name": "nadam", "eps": 1e-6}},
    "adagrad": {**COMMON, "optim": {"name": "adagrad"}},
    "adadelta": {**COMMON, "optim": {"name": "adadelta"}},
    # Two steps an epoch are enough: each is several passes over its batch.
    "lbfgs": {"model": COMMON["model"], "optim": {"name": "lbfgs", "lr": 0.1}, "data": {"global_batch_size": 100}},
    "bf16": {**COMMON, "parallel": {"grad_accum_steps": 3, "precision": "bf16"}},
    "bf16_gradients": {**COMMON, "parallel": {"grad_accum_steps": 3, "numerics": "bf16_gradients"}},
}

# At other world sizes, in float64. An epoch has 11 steps, the last of two samples: fewer than four ranks.
WORLD_SIZES, STEPS, BATCHES = (2, 1, 4, 2), 200, 10
QUARTER = STEPS // len(WORLD_SIZES)  # ends in the middle of an epoch each time
RESIZED = {
    "optim": {"name": "adam", "lr": 3e-3, "max_grad_norm": 0.5},
    "loss": {"class_weights": CLASS_WEIGHTS},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}


def config_of(folder: Path, name: str) -> Config:
    data = {"dataset": "synthetic", "global_batch_size": 16, **CASES[name].get("data", {})}
    run = {"root": str(folder), "name": name, "epochs": EPOCHS}
    return FashionConfig.model_validate({**CASES[name], "run": run, "data": data, "tracking": {"wandb": "disabled"}})


def steps_per_epoch(name: str) -> int:
    return -(-TRAIN_COUNT // config_of(Path(), name).data.global_batch_size)


class StoppingDataset(RandomDataset):
    """Random images that set `stop` on their rank when batch number `at` (from 1) is read.

    The first batch of the test data is tried before step 1.
    """

    def __init__(self, config: Any, count: int, stop: StopFlag, at: int | None) -> None:
        super().__init__(config, count, Fault("none"))
        self.stop, self.at, self.batches_read = stop, at, 0

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        self.batches_read += 1
        if self.batches_read == self.at:
            self.stop.reason = "signal_term"
        return super().batch(indices, key)


def train(group: Group, config: Config, in_step: int | None = None, in_evaluation: bool = False) -> None:
    """Train; only rank 1 is asked to stop, in the `in_step`-th step from here, or in the evaluation."""
    stop, is_rank1 = StopFlag(), group.rank == 1
    at = (in_step - 1) * config.parallel.grad_accum_steps + 1 if is_rank1 and in_step else None
    data = TrainTestData(
        StoppingDataset(config.data, TRAIN_COUNT, stop, at),
        StoppingDataset(config.data, TEST_COUNT, stop, 2 if is_rank1 and in_evaluation else None),
    )
    train_in_group(group, config, data, stop)


def train_all_cases(group: Group, folder: Path) -> None:
    """Train every case twice: uninterrupted; and stopped in the first epoch, its evaluation and the second epoch."""
    for name in CASES:
        train(group, config_of(folder / "uninterrupted", name))
        half, stopped = steps_per_epoch(name) // 2, config_of(folder / "stopped", name)
        with patch("fnet_dist.training.window.WINDOW_S", 0):  # a window is one step: training stops right after it
            for ask in ({"in_step": half}, {"in_evaluation": True}, {"in_step": half}):
                with suppress(StoppedError):
                    train(group, stopped, **ask)
        train(group, stopped)


def resume_and_train(group: Group, folder: Path, last: int) -> None:
    """Resume in float64 from the checkpoint in `folder`, if there is one, train to step `last`, and save there."""
    config, dataset, run = FashionConfig.model_validate(RESIZED), RecordingDataset(64 * BATCHES + 2), RunDir(folder)
    torch.manual_seed(
        0 if not run.checkpoints.exists() else last
    )  # other initial weights: all must come from the checkpoint
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10), nn.LogSoftmax(dim=1)).double()
    parts = build(group, config, dataset, model, classifier_loss(config.loss))
    per_epoch = parts.sampler.steps_per_epoch
    restore_checkpoint(parts.state, run, group, per_epoch)
    losses = list(step_losses(parts, dataset, last))
    if group.is_rank0:
        content = encode(snapshot_state(parts.state, read_json(run.manifest)["id"], per_epoch))
        save_checkpoint(run, content, 1, lambda: None)
    torch.save({"losses": losses, "asked": dataset.asked}, folder / f"to_{last}_rank_{group.rank}")


def train_on_two_ranks(group: Group, folder: Path) -> None:
    train_all_cases(group, folder)
    resume_and_train(group, folder / "resized", QUARTER)


def train_on_one_rank(group: Group, folder: Path) -> None:
    resume_and_train(group, folder / "single_rank", STEPS)
    resume_and_train(group, folder / "resized", 2 * QUARTER)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which everything has been trained: uninterrupted/, stopped/, single_rank/ and resized/."""
    folder = tmp_path_factory.mktemp("stopping")
    for name in ("single_rank", "resized"):
        (folder / name).mkdir()
        open_manifest(RunDir(folder / name))
    run_ranks(train_on_two_ranks, 2, folder)
    run_ranks(train_on_one_rank, 1, folder)
    run_ranks(resume_and_train, 4, folder / "resized", 3 * QUARTER)
    run_ranks(resume_and_train, 2, folder / "resized", STEPS)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_at_the_same_world_size_a_run_ends_bit_identical(trained: Path, name: str) -> None:
    uninterrupted, stopped = (RunDir(trained / kind / name) for kind in ("uninterrupted", "stopped"))
    ends = [read_json(path) for path in sorted(stopped.attempts.glob("*/end.json"))]
    first, second = steps_per_epoch(name), 2 * steps_per_epoch(name)
    assert [end["step"] for end in ends] == [first // 2, first, first + first // 2, second]
    assert [end["reason"] for end in ends] == ["signal_term"] * 3 + ["finished"]
    assert run_differences(uninterrupted, stopped) == []
    assert gaps(stopped) == []


def steps_of(folder: Path, last: int, world_size: int) -> tuple[list[float], list[set[int]]]:
    """Return the losses and the samples, over all ranks, of the steps that were trained up to step `last`."""
    ranks = [torch.load(folder / f"to_{last}_rank_{rank}") for rank in range(world_size)]
    steps = zip(*(rank["asked"] for rank in ranks), strict=True)
    return ranks[0]["losses"], [{index for local_batch in step for index in local_batch} for step in steps]


def test_resumed_on_2_then_1_then_4_then_2_ranks_a_run_has_the_same_samples_and_losses(
    trained: Path,
) -> None:
    losses, samples = steps_of(trained / "single_rank", STEPS, 1)
    assert len(losses) == len(samples) == STEPS
    assert {len(batch) for batch in samples} == {64, 2}
    resized = [steps_of(trained / "resized", (n + 1) * QUARTER, size) for n, size in enumerate(WORLD_SIZES)]
    assert [len(attempt[0]) for attempt in resized] == [QUARTER] * 4
    assert [batch for attempt in resized for batch in attempt[1]] == samples
    torch.testing.assert_close(
        torch.tensor([loss for attempt in resized for loss in attempt[0]], dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )
    assert sum(losses[-10:]) < sum(losses[:10])
