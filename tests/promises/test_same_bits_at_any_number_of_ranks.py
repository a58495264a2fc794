"""Promise 5: with parallel.numerics invariant, weights, optimizer and ledger have the same bits at any number of ranks.

Trained by real gloo ranks: on the real data where it is (FNET_DATA), else on the stand-in.
"""

import hashlib
import io
import os
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fnet_dist.checkpoint.storage import checkpoint_steps, read_checkpoint
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.config.schema import Config
from fnet_dist.distributed import shared_memory
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.errors import ConfigError, DesyncError
from fnet_dist.run import metrics_log
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.run_dir import RunDir, read_json, run_dir_of, write_json
from fnet_dist.run.stop import StopFlag
from fnet_dist.training import loop
from fnet_dist.training.setup import TrainTestData, build_data, claim_run
from fnet_dist.training.trainer import fit
from fnet_dist.training.window import Window
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.processes

STEPS = 300
EVERYTHING: dict[str, Any] = {
    "model": {"dropout": 0.25},
    "optim": {"lr": 3e-3, "max_grad_norm": 1},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}
# Of 100 samples, shards have 12 or 13.
CASES: dict[str, dict[str, Any]] = {
    "float32": {**EVERYTHING, "data": {"global_batch_size": 100}},
    "bf16": {**EVERYTHING, "data": {"global_batch_size": 100}, "parallel": {"precision": "bf16"}},
    "momentum, weights, pieces": {
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "loss": {"class_weights": [1.0, 2.0, 0.5, 1.0, 1.5, 0.1, 3.0, 1.0, 0.7, 1.2]},
        "data": {"global_batch_size": 48},
        "parallel": {"grad_accum_steps": 2},
    },
    "lbfgs": {"optim": {"name": "lbfgs", "lr": 0.05}, "data": {"global_batch_size": 130}},
}
SMALL = "momentum, weights, pieces"
# Three epochs of 130 samples; the last batch of 48 has 34, so shards and pieces are uneven.
SHORT = (SMALL, "lbfgs")
WAYS = {"1": 1, "2": 2, "4": 4, "8": 8, "4 by gloo": 4}


def config_of(folder: Path, case: str, steps: int = STEPS) -> Config:
    real = os.environ.get("FNET_DATA")
    data = {"dataset": "synthetic"} if real is None else {"root": real}
    settings = CASES[case]
    return Config.model_validate(
        {
            **settings,
            "run": {"root": str(folder), "name": case.split(",", maxsplit=1)[0], "epochs": 3, "max_steps": steps},
            "data": {**data, **settings.get("data", {})},
            "parallel": {"numerics": "invariant", "hash_every_steps": 20, **settings.get("parallel", {})},
            "checkpoint": {"every_steps": 50},
            "tracking": {"wandb": "disabled"},
        }
    )


def train(group: Group, config: Config) -> None:
    """What trainer.train does, in a process group that is there already."""
    check_batch_split(config, group.world_size)
    short = [config_of(Path(), case).run.name for case in SHORT]
    random = TrainTestData(*(RandomDataset(config.data, count, Fault("none")) for count in (130, 20)))
    data = random if config.run.name in short else build_data(config, group)
    config, attempt = claim_run(config, group, LaunchEnv(), data)
    progress = RunOutcomeWriter(attempt if group.is_rank0 else None)
    with Watchdog(group.rank, 60, print) as guard, record_outcome(progress):
        fit(config, group, attempt, data, progress, StopFlag(), guard)


def all_cases(group: Group, folder: Path) -> None:
    for case in CASES:
        train(group, config_of(folder, case))


def without_shared_memory(group: Group, folder: Path) -> None:
    """As on several machines: ranks send and receive in pairs."""
    with patch.object(shared_memory, "_MOST", 0):
        train(group, config_of(folder, "float32"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each way, the folder with a run of each case."""
    found = {way: tmp_path_factory.mktemp(way.replace(" ", "-")) for way in WAYS}
    for way, world_size in WAYS.items():
        run_ranks(without_shared_memory if "gloo" in way else all_cases, world_size, found[way])
    return found


def sha256_of(run: RunDir) -> dict[str, str]:
    """Of the weights and of the optimizer's state at the end."""
    last = read_checkpoint(run.checkpoint(checkpoint_steps(run)[0]))
    return {name: hashlib.sha256(getattr(last, name)).hexdigest() for name in ("model", "optimizer")}


def on_record(run: RunDir) -> list[dict[str, Any]]:
    """What the ledger says of steps, epochs and weights, but for the clock, and for what is each rank's own."""
    free = ("time", "seconds", "samples_per_second", "attempt", "loss_per_rank")
    lines = (line for line in metrics_log.read(run.metrics_log) if line["kind"] != "window")
    return [{key: value for key, value in line.items() if key not in free} for line in lines]


@pytest.mark.parametrize(
    ("case", "way"), [(case, way) for case in CASES for way in ("2", "4", "8")] + [("float32", "4 by gloo")]
)
def test_every_number_of_ranks_gives_the_bits_of_one(folders: dict[str, Path], case: str, way: str) -> None:
    one, many = (run_dir_of(config_of(folders[which], case)) for which in ("1", way))
    assert sha256_of(many) == sha256_of(one)
    assert on_record(many) == on_record(one)
    steps = [line["step"] for line in on_record(many) if line["kind"] == "hash"]
    last = 9 if case in SHORT else STEPS
    assert steps == list(range(20, last + 1, 20))
    assert many.model.read_bytes() == one.model.read_bytes()


def killed_after(group: Group, folder: Path, case: str, steps: int, kill_at: int | None) -> None:
    """Train to `steps`; every rank is killed in the window after `kill_at`."""

    def train_epoch(*arguments: Any) -> Iterator[Window]:
        for window in loop.train_epoch(*arguments):
            if kill_at is not None and window.steps[-1].step > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield window

    with patch("fnet_dist.training.trainer.train_epoch", train_epoch):
        train(group, config_of(folder, case, steps))


@pytest.mark.parametrize("case", ["float32", "bf16"])
def test_a_run_that_moves_from_4_ranks_to_1_to_8_to_2_and_is_killed_has_the_bits_of_one_that_stayed(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(killed_after, 4, tmp_path, case, 100, 60)
    run = run_dir_of(config_of(tmp_path, case))
    assert checkpoint_steps(run)[0] == 50
    for world_size, steps in ((4, 100), (1, 160), (8, 230), (2, STEPS)):
        run_ranks(killed_after, world_size, tmp_path, case, steps, None)
    stayed = run_dir_of(config_of(folders["1"], case))
    assert sha256_of(run) == sha256_of(stayed)
    kinds = ("train", "hash")
    assert [line for line in on_record(run) if line["kind"] in kinds] == [
        line for line in on_record(stayed) if line["kind"] in kinds
    ]


def with_a_flipped_bit(group: Group, folder: Path, odd: int) -> None:
    """The rank `odd` loses a bit of one weight after step 30."""

    def train_epoch(step: Any, *arguments: Any) -> Iterator[Window]:
        for window in loop.train_epoch(step, *arguments):
            if group.rank == odd and window.steps[-1].step == 40:
                weight = step.exchange.model.hidden2.weight.data.view(torch.int32)
                weight[3, 4] ^= 1 << 20
            yield window

    with (
        patch("fnet_dist.training.trainer.train_epoch", train_epoch),
        pytest.raises(
            DesyncError, match=rf"after step 50 rank {odd} has other weights than .* in hidden2.weight"
        ) as found,
    ):
        train(group, config_of(folder, "float32"))
    assert ("than the others" in str(found.value)) == (group.world_size > 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_bit_that_flips_on_one_rank_is_found_and_named_before_a_checkpoint_is_written_from_it(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(with_a_flipped_bit, world_size, tmp_path, 1)
    assert checkpoint_steps(run_dir_of(config_of(tmp_path, "float32"))) == []  # the one of step 50 was due


def test_ranks_that_cannot_share_the_shards_are_told_how_many_can() -> None:
    config = config_of(Path(), "float32")
    with pytest.raises(ConfigError, match=r"logical_shards 8 cannot be shared by 3 ranks; use 1, 2, 4 or 8 ranks"):
        check_batch_split(config, 3)
    with pytest.raises(ValueError, match=r"logical_shards 6 is not a power of 2.*--parallel.logical-shards 4"):
        Config.model_validate({"parallel": {"numerics": "invariant", "logical_shards": 6}})


def statistics_of_a_share(group: Group, folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.BatchNorm1d(10))
    with (
        patch("fnet_dist.training.trainer.build_model", lambda config: model),
        pytest.raises(ConfigError, match="the model has buffers, like BatchNorm's statistics"),
    ):
        train(group, config_of(folder, "float32"))


def test_a_model_with_buffers_is_refused(tmp_path: Path) -> None:
    run_ranks(statistics_of_a_share, 1, tmp_path)


def after_another_machine(group: Group, folder: Path) -> None:
    train(group, config_of(folder, SMALL, 3))
    run = run_dir_of(config_of(folder, SMALL))
    manifest = read_json(run.manifest)
    manifest["conditions"]["threads"] = 7
    write_json(run.manifest, manifest)
    with redirect_stdout(io.StringIO()) as said:
        train(group, config_of(folder, SMALL, 5))
    lines = [line for line in said.getvalue().splitlines() if "the bits may be others" in line]
    assert lines == ["WARNING: the bits may be others from here on: threads 1, before 7"]


def test_a_resume_under_other_conditions_says_so_in_one_line(tmp_path: Path) -> None:
    run_ranks(after_another_machine, 1, tmp_path)
    receipt = read_json(run_dir_of(config_of(tmp_path, SMALL)).manifest)["receipt"]
    assert sorted(receipt) == ["code", "config", "data", "environment"]
    assert all(len(value) == 64 for value in receipt.values())
