"""Promise: with `parallel.numerics invariant`, a run has the same bits at any number of ranks.

The same bits means: equal hashes of the weights and of the optimizer's state, and equal losses in the metrics log. Real
gloo ranks train, on Fashion-MNIST if FNET_DATA names it, otherwise on synthetic data, with random augmentation and
another number of data workers at each number of ranks.
"""

import hashlib
import io
import os
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fnet_dist.checkpoint.storage import checkpoint_steps, read_checkpoint
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.config.schema import Config
from fnet_dist.distributed import shared_memory
from fnet_dist.distributed.process_group import Group
from fnet_dist.errors import ConfigError, DesyncError
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json, run_dir_of, write_json
from fnet_dist.training import loop
from fnet_dist.training.setup import TrainTestData, build_data
from fnet_dist.training.window import Window
from tests.helpers.config import FashionConfig
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train_in_group

pytestmark = pytest.mark.processes

STEPS = 80
LONG = 300  # in make soak
ALL_FEATURES: dict[str, Any] = {
    "model": {"dropout": 0.25},
    "optim": {"lr": 3e-3, "max_grad_norm": 1},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}
# Data workers of each rank, by the number of ranks; without any, the data is in memory.
WORKERS = {1: 0, 2: 1, 4: 3, 8: 0}
# A global batch of 100 samples gives the 8 logical shards 12 or 13 each.
CASES: dict[str, dict[str, Any]] = {
    "float32": {**ALL_FEATURES, "data": {"global_batch_size": 100, "augment": True}},
    "bf16": {**ALL_FEATURES, "data": {"global_batch_size": 100}, "parallel": {"precision": "bf16"}},
    "momentum, weights, microbatches": {
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "loss": {"class_weights": [1.0, 2.0, 0.5, 1.0, 1.5, 0.1, 3.0, 1.0, 0.7, 1.2]},
        "data": {"global_batch_size": 48},
        "parallel": {"grad_accum_steps": 2},
    },
    "lbfgs": {"optim": {"name": "lbfgs", "lr": 0.05}, "data": {"global_batch_size": 130}},
}
SMALL = "momentum, weights, microbatches"
# These train three epochs of 130 random samples: the last batch of 48 has 34, so shards and microbatches are uneven.
SHORT = (SMALL, "lbfgs")
# How to train -> number of ranks. Ranks of one machine use shared memory, those of several gloo.
WAYS = {"1": 1, "2": 2, "4": 4, "8": 8, "4 by gloo": 4}
PAIRS = [(case, way) for case in CASES for way in ("2", "4", "8")] + [("float32", "4 by gloo")]
LONG_PAIRS = [("bf16", "8"), ("lbfgs", "8")]  # eight processes on two cores take long: only in make soak


def config_of(folder: Path, case: str, steps: int = STEPS) -> Config:
    real = os.environ.get("FNET_DATA")
    data = {"dataset": "synthetic"} if real is None else {"root": real}
    settings = CASES[case]
    return FashionConfig.model_validate(
        {
            **settings,
            "run": {"root": str(folder), "name": case.split(",", maxsplit=1)[0], "epochs": 3, "max_steps": steps},
            "data": {**data, **settings.get("data", {})},
            "parallel": {"numerics": "invariant", "hash_every_steps": 20, **settings.get("parallel", {})},
            "checkpoint": {"every_steps": 30},
            "tracking": {"wandb": "disabled"},
        }
    )


def train(group: Group, config: Config) -> None:
    check_batch_split(config, group.world_size)
    short = [config_of(Path(), case).run.name for case in SHORT]
    workers = config.data.model_copy(update={"num_workers": WORKERS[group.world_size]})
    config = config.model_copy(update={"data": workers})
    random = TrainTestData(*(RandomDataset(config.data, count, Fault("none")) for count in (130, 20)))
    # The 10,000 real test samples would take as long as the training.
    data = random if config.run.name in short else TrainTestData(build_data(config, group).train, random.test)
    train_in_group(group, config, data)


def train_all_cases(group: Group, folder: Path, steps: int) -> None:
    for case in CASES:
        if steps == LONG or (case, str(group.world_size)) not in LONG_PAIRS:
            train(group, config_of(folder, case, steps))


def train_without_shared_memory(group: Group, folder: Path, steps: int) -> None:
    """Train as on several machines, where ranks send and receive in pairs."""
    with patch.object(shared_memory, "_MAX_BYTES", 0):
        train(group, config_of(folder, "float32", steps))


@dataclass(frozen=True)
class Trained:
    """A run of each case, to step `steps`, in one folder for each way."""

    folders: dict[str, Path]
    steps: int


def train_in_every_way(tmp_path_factory: pytest.TempPathFactory, steps: int) -> Trained:
    folders = {way: tmp_path_factory.mktemp(way.replace(" ", "-")) for way in WAYS}
    for way, world_size in WAYS.items():
        train_cases = train_without_shared_memory if "gloo" in way else train_all_cases
        run_ranks(train_cases, world_size, folders[way], steps)
    return Trained(folders, steps)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_in_every_way(tmp_path_factory, STEPS)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_in_every_way(tmp_path_factory, LONG)


def sha256_of(run: RunDir) -> dict[str, str]:
    """Return the hashes of the weights and of the optimizer's state in the last checkpoint."""
    last = read_checkpoint(run.checkpoint(checkpoint_steps(run)[0]))
    return {name: hashlib.sha256(getattr(last, name)).hexdigest() for name in ("model", "optimizer")}


def logged(run: RunDir) -> list[dict[str, Any]]:
    """Return the lines of steps, epochs and hashes, without times and without the losses of each rank."""
    free = ("time", "seconds", "samples_per_second", "attempt", "loss_per_rank")
    lines = (line for line in metrics_log.read(run.metrics_log) if line["kind"] != "window")
    return [{key: value for key, value in line.items() if key not in free} for line in lines]


@pytest.mark.parametrize(
    ("runs", "case", "way"),
    [
        *(("short", *pair) for pair in PAIRS if pair not in LONG_PAIRS),
        *(pytest.param("long", *pair, marks=pytest.mark.soak) for pair in PAIRS),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits_as_a_single_rank(
    request: pytest.FixtureRequest, runs: str, case: str, way: str
) -> None:
    trained: Trained = request.getfixturevalue(runs)
    single_rank, many = (run_dir_of(config_of(trained.folders[which], case)) for which in ("1", way))
    assert sha256_of(many) == sha256_of(single_rank)
    assert logged(many) == logged(single_rank)
    steps = [line["step"] for line in logged(many) if line["kind"] == "hash"]
    last = 9 if case in SHORT else trained.steps
    assert steps == list(range(20, last + 1, 20))
    assert many.model.read_bytes() == single_rank.model.read_bytes()


def train_until(group: Group, folder: Path, case: str, steps: int, kill_at: int | None) -> None:
    """Train to step `steps`; kill every rank in the window after step `kill_at`, if given."""

    def train_epoch(*arguments: Any) -> Iterator[Window]:
        for window in loop.train_epoch(*arguments):
            if kill_at is not None and window.steps[-1].step > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield window

    with patch("fnet_dist.training.epochs.train_epoch", train_epoch):
        train(group, config_of(folder, case, steps))


@pytest.mark.parametrize(
    ("runs", "case"),
    [("short", "float32"), *(pytest.param("long", case, marks=pytest.mark.soak) for case in ("float32", "bf16"))],
)
def test_a_run_that_is_killed_and_resumed_on_4_then_1_then_8_then_2_ranks_has_the_same_bits_as_an_uninterrupted_run(
    request: pytest.FixtureRequest, tmp_path: Path, runs: str, case: str
) -> None:
    trained: Trained = request.getfixturevalue(runs)
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(train_until, 4, tmp_path, case, 60, 45)
    run = run_dir_of(config_of(tmp_path, case))
    assert checkpoint_steps(run)[0] == 30
    for world_size, steps in ((4, 60), (1, 65), (8, 70), (2, trained.steps)):
        run_ranks(train_until, world_size, tmp_path, case, steps, None)
    uninterrupted = run_dir_of(config_of(trained.folders["1"], case))
    assert sha256_of(run) == sha256_of(uninterrupted)
    kinds = ("train", "hash")
    assert [line for line in logged(run) if line["kind"] in kinds] == [
        line for line in logged(uninterrupted) if line["kind"] in kinds
    ]


def train_with_a_flipped_bit(group: Group, folder: Path, odd: int) -> None:
    """Train, and flip a bit of one weight on rank `odd` after step 20; check that all ranks raise DesyncError."""

    def train_epoch(step: Any, *arguments: Any) -> Iterator[Window]:
        for window in loop.train_epoch(step, *arguments):
            if group.rank == odd and window.steps[-1].step == 20:
                weight = step.gradient_sync.module.model.hidden2.weight.data.view(torch.int32)
                weight[3, 4] ^= 1 << 20
            yield window

    with (
        patch("fnet_dist.training.epochs.train_epoch", train_epoch),
        pytest.raises(
            DesyncError, match=rf"after step 30 rank {odd} has other weights than .* in hidden2.weight"
        ) as error,
    ):
        train(group, config_of(folder, "float32"))
    assert ("than the others" in str(error.value)) == (group.world_size > 2)
    assert error.value.rank == (odd if group.world_size > 2 else None), "of two ranks, either may be at fault"


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_flipped_bit_on_one_rank_is_detected_and_its_rank_named_before_a_checkpoint_is_saved(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(train_with_a_flipped_bit, world_size, tmp_path, 1)
    assert checkpoint_steps(run_dir_of(config_of(tmp_path, "float32"))) == []  # that of step 30 was due


def test_a_number_of_ranks_that_does_not_divide_the_shards_is_refused_with_the_numbers_that_do() -> None:
    config = config_of(Path(), "float32")
    with pytest.raises(ConfigError, match=r"logical_shards 8 cannot be shared by 3 ranks; use 1, 2, 4 or 8 ranks"):
        check_batch_split(config, 3)
    with pytest.raises(ValueError, match=r"logical_shards 6 is not a power of 2.*--parallel.logical-shards 4"):
        FashionConfig.model_validate({"parallel": {"numerics": "invariant", "logical_shards": 6}})


def check_buffers_are_refused(group: Group, folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.BatchNorm1d(10))
    with (
        patch("fnet_dist.recipes.fashion_mnist.build_model", lambda config, train_data: model),
        pytest.raises(ConfigError, match="the model has buffers, like BatchNorm's statistics"),
    ):
        train(group, config_of(folder, "float32"))


def test_a_model_with_buffers_is_refused(tmp_path: Path) -> None:
    run_ranks(check_buffers_are_refused, 1, tmp_path)


def resume_on_another_machine(group: Group, folder: Path) -> None:
    train(group, config_of(folder, SMALL, 3))
    run = run_dir_of(config_of(folder, SMALL))
    manifest = read_json(run.manifest)
    manifest["conditions"]["threads"] = 7
    write_json(run.manifest, manifest)
    with redirect_stdout(io.StringIO()) as printed:
        train(group, config_of(folder, SMALL, 5))
    lines = [line for line in printed.getvalue().splitlines() if "results may differ" in line]
    assert lines == ["WARNING: results may differ in the last bits from here on: threads 1, before 7"]


def test_a_resume_under_other_conditions_prints_one_warning(tmp_path: Path) -> None:
    run_ranks(resume_on_another_machine, 1, tmp_path)
    receipt = read_json(run_dir_of(config_of(tmp_path, SMALL)).manifest)["receipt"]
    assert sorted(receipt) == ["code", "config", "data", "environment"]
    assert all(len(value) == 64 for value in receipt.values())
