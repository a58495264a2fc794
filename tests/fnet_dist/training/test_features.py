"""Every setting trains on two ranks, and both ranks stop together on a failure; one start for each world size."""

import math
import os
import re
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gpu_meter import GpuMeter, GpuUsage
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.model_with_loss import build_model_with_loss
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.errors import ConfigError, FnetError, NonFiniteError
from fnet_dist.recipes.fashion_mnist.settings import DataConfig
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt, heartbeat_thread
from fnet_dist.run.run_dir import RunDir, run_dir_of
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.loop import train_epoch
from fnet_dist.training.setup import TrainTestData, build_data
from fnet_dist.training.step import Step
from tests.helpers.config import FashionConfig
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.helpers.training import classifier_loss, train_in_group

pytestmark = pytest.mark.processes

SMALL_STEP = {"name": "sgd", "lr": 1e-12}
TOGETHER: dict[str, Any] = {
    "model": {"dropout": 0.25},
    "optim": {"max_grad_norm": 0.1},
    "schedule": {"name": "cosine", "warmup_steps": 5},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fifty steps": {},
    "sequential": {"model": {"form": "sequential"}},
    "functional": {"model": {"form": "functional"}},
    "tanh": {"model": {"activation": "tanh"}},
    "logits": {"model": {"head": "logits"}, "loss": {"name": "cross_entropy"}},
    "smoothing": {"model": {"head": "logits"}, "loss": {"name": "cross_entropy", "label_smoothing": 0.1}},
    "class weights": {"loss": {"class_weights": [1.0, 2.0, 0.5, 1.0, 1.5, 0.1, 3.0, 1.0, 0.7, 1.2]}},
    "adamw": {"optim": {"name": "adamw"}},
    "sgd": {"optim": {"name": "sgd", "lr": 0.02, "momentum": 0.9}},
    "adagrad": {"optim": {"name": "adagrad"}},
    "adadelta": {"optim": {"name": "adadelta"}},
    "lbfgs": {"optim": {"name": "lbfgs", "lr": 0.1}, "data": {"global_batch_size": 127}},  # a few steps: each is slow
    "cosine": {"schedule": {"name": "cosine", "warmup_steps": 5}},
    "onecycle": {"schedule": {"name": "onecycle"}, "optim": {"lr": 0.01}},
    "accumulation": {"parallel": {"grad_accum_steps": 3}},
    "bf16": {"parallel": {"precision": "bf16"}},
    "bf16 gradients": {"parallel": {"numerics": "bf16_gradients"}},
    "clipping": {"optim": {"max_grad_norm": 0.1}},
    "dropout": {"model": {"dropout": 0.25}},
    "dropout again": {"model": {"dropout": 0.25}},
    "dropout, no learning": {"model": {"dropout": 0.25}, "optim": SMALL_STEP},
    "no dropout, no learning": {"optim": SMALL_STEP},
    "together": {**TOGETHER, "parallel": {"grad_accum_steps": 2}},
    "together, compiled": {**TOGETHER, "parallel": {"grad_accum_steps": 2, "compile": True}},
}
SAME_AS_PLAIN = ("sequential", "functional", "logits")
STEPS = 18  # two epochs; 130 samples are 9 steps, the last of 2 samples


class OneImage(RandomDataset):
    """A data set of 130 times the same image: only dropout differs between ranks and steps."""

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        return super().batch(torch.zeros_like(indices), key)


def config_of(folder: Path, name: str) -> Config:
    run = {"root": str(folder), "name": re.sub(r"\W+", "_", name), "epochs": 6 if name == "fifty steps" else 2}
    data = {"dataset": "synthetic", "global_batch_size": 16, **CASES[name].get("data", {})}
    return FashionConfig.model_validate({**CASES[name], "run": run, "data": data, "tracking": {"wandb": "disabled"}})


def train_case(group: Group, folder: Path, name: str) -> None:
    config = config_of(folder, name)
    kind = OneImage if name.endswith("no learning") else RandomDataset
    data = TrainTestData(*(kind(config.data, count, Fault("none")) for count in (130, 20)))
    train_in_group(group, config, data, timeout_s=120)


def train_cases(group: Group, folder: Path, names: list[str]) -> None:
    for name in names:
        train_case(group, folder, name)


def everything_on_two_ranks(group: Group, folder: Path, real_data: str | None) -> None:
    train_cases(group, folder, list(CASES))
    check_a_gradient_that_is_not_finite_stops_both(group)
    check_a_compiled_model_with_batch_norm_is_compiled_once(group)
    check_a_batch_without_weight_is_explained_with_lbfgs_too(group, folder)
    check_data_must_be_intact_and_the_same(group, folder, real_data)
    check_one_of_two_ranks_claims_an_attempt(group, folder)


class Poison(torch.autograd.Function):
    """The identity in forward, NaN in backward."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class PoisonedOnce(nn.Module):
    """A layer whose gradient is NaN in the third pass, while its output is finite; only if `here`."""

    def __init__(self, here: bool) -> None:
        super().__init__()
        self.layer, self.here, self.passes = nn.Linear(784, 10), here, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = torch.log_softmax(self.layer(x), dim=1)
        return Poison.apply(x) if self.here and self.passes == 3 else x


def build(
    group: Group, model: nn.Module, dataset: Dataset, **parallel: Any
) -> tuple[TrainState, Step, GlobalBatchSampler]:
    config = FashionConfig.model_validate({"parallel": parallel})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = classifier_loss(config.loss)
    sync = GradientSync(build_model_with_loss(model, loss, config.parallel, group.device), group, config.parallel)
    step = Step(sync, loss, optimizer, optimizer.step, group, lr_of=lambda number: 0.01, seed=0)
    sampler = GlobalBatchSampler(dataset, global_batch_size=16, rank=group.rank, world_size=group.world_size)
    return TrainState(model, optimizer), step, sampler


def train_an_epoch(group: Group, model: nn.Module, dataset: Dataset, seen: list[Any]) -> Step:
    """Train one epoch, append the windows' steps to `seen`, and return the Step."""
    state, step, sampler = build(group, model, dataset)
    meter = GpuMeter()
    meter.usage = GpuUsage(percent=50.0 + group.rank, memory_gib=1.0, watts=2.0, celsius=3.0)
    with Watchdog(group.rank, 60, print) as watchdog:
        for window in train_epoch(step, sampler, dataset, state, StopFlag(), watchdog, gpu_meter=meter):
            seen.extend(window.steps)
            assert window.by_rank["gpu_percent"].tolist() == [50.0 + rank for rank in range(group.world_size)]
    return step


def check_a_gradient_that_is_not_finite_stops_both(group: Group) -> None:
    seen: list[Any] = []
    dataset = RandomDataset(DataConfig(), 130, Fault("none"))
    with pytest.raises(NonFiniteError, match=r"gradient.* is nan at step 3 on rank 1"):
        train_an_epoch(group, PoisonedOnce(group.rank == 1), dataset, seen)
    assert [one.step for one in seen] == [1, 2]


def check_a_compiled_model_with_batch_norm_is_compiled_once(group: Group) -> None:
    """Steps that are timed run the same code as others: the timer is outside of what is compiled."""
    model = nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10), nn.LogSoftmax(dim=1))
    dataset = RandomDataset(DataConfig(), 96, Fault("none"))  # six batches of 16
    _, step, sampler = build(group, model, dataset, compile=True)
    data = dataset.batches((each.indices for batch in sampler.steps() for each in batch.microbatches), 0)
    step.take(1, next(iter(sampler.steps())), data)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number, batch in enumerate(islice(sampler.steps(), 1, None), start=2):
        step.take(number, batch, data, timed=number % 2 == 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled >= 1


def check_a_batch_without_weight_is_explained_with_lbfgs_too(group: Group, folder: Path) -> None:
    settings = {"optim": {"name": "lbfgs"}, "loss": {"class_weights": [0.0] * 9 + [1.0]}}
    place = {"run": {"root": str(folder), "name": "weightless"}, "data": {"global_batch_size": 16}}
    config = FashionConfig.model_validate({**settings, **place, "tracking": {"wandb": "disabled"}})
    data = TrainTestData(*(RandomDataset(config.data, count, Fault("none")) for count in (130, 20)))
    data.train.targets.zero_()
    with pytest.raises(NonFiniteError, match=r"the loss's weights add up to 0 at step 1: "):
        train_in_group(group, config, data)


def check_data_must_be_intact_and_the_same(group: Group, folder: Path, real_data: str | None) -> None:
    """Check that if rank 1's data is damaged, or another than rank 0's, both ranks raise and name rank 1."""

    def expect_error(dataset: str, root: Path, *parts: str) -> None:
        config = DataConfig.model_validate({"dataset": dataset, "root": str(root)})
        with pytest.raises(FnetError) as caught:
            build_data(FashionConfig(data=config), group)
        assert (caught.value.exit_code, caught.value.reason) == (65, "data")
        assert str(caught.value).startswith("rank 1")
        assert all(part in str(caught.value) for part in parts), caught.value

    expect_error(("synthetic", "fashion-mnist")[group.rank], folder, "t10k-labels-idx1-ubyte is not the official file")
    if real_data is not None:
        dataset = ("fashion-mnist", "synthetic")[group.rank]
        expect_error(dataset, Path(real_data), "rank 0 has ", "give every node the same files")


def check_one_of_two_ranks_claims_an_attempt(group: Group, folder: Path) -> None:
    """Check fifty times that the other rank leaves no files. It waits for a heartbeat, here every 0.02 s."""
    for number in range(50):
        run = RunDir(folder / "claims" / str(number))
        dist.barrier()
        won = torch.zeros(1)
        with patch("fnet_dist.run.attempt.HEARTBEAT_EVERY_S", 0.02), ExitStack() as owned:
            with suppress(ConfigError):
                attempt = claim_attempt(run)
                owned.enter_context(heartbeat_thread(attempt))
                won += attempt.number
            dist.all_reduce(won)
        assert won.item() == 1
        assert [path.name for path in run.attempts.iterdir()] == ["0001"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with a run of each case, trained by two ranks."""
    folder = tmp_path_factory.mktemp("features")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes(10_008))
    run_ranks(everything_on_two_ranks, 2, folder, os.environ.get("FNET_DATA"), timeout_s=240)
    return folder


def lines(runs: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(run_dir_of(config_of(runs, name)).metrics_log) if line["kind"] == kind]


def losses(runs: Path, name: str) -> list[float]:
    return [line["loss"] for line in lines(runs, name, "train")]


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(("no learning", "fifty steps"))])
def test_two_ranks_learn_with_every_setting(runs: Path, name: str) -> None:
    assert len(losses(runs, name)) == (4 if name == "lbfgs" else STEPS)
    assert all(map(math.isfinite, losses(runs, name)))
    first, second = lines(runs, name, "epoch")
    assert second["train_loss"] < first["train_loss"]
    assert [line["count"] for line in lines(runs, name, "eval")] == [20, 20]
    if name not in ("plain", "dropout again", *SAME_AS_PLAIN):
        assert losses(runs, name) != losses(runs, "plain")


def test_the_end_of_the_first_epoch_is_saved_however_short_it_was(runs: Path) -> None:
    assert checkpoint_steps(run_dir_of(config_of(runs, "plain"))) == [STEPS, STEPS // 2]


@pytest.mark.parametrize("name", [*SAME_AS_PLAIN, "accumulation", "bf16", "bf16 gradients"])
def test_another_form_or_precision_has_nearly_the_same_losses(runs: Path, name: str) -> None:
    tolerance = 1e-3 if name in SAME_AS_PLAIN else 0.05
    assert losses(runs, name)[:10] == pytest.approx(losses(runs, "plain")[:10], abs=tolerance)


def test_the_gradient_norm_is_logged_in_every_step_with_clipping_and_otherwise_in_every_fiftieth(runs: Path) -> None:
    clipped, unclipped = (lines(runs, name, "train") for name in ("clipping", "fifty steps"))
    assert all(line["grad_norm"] > 0.1 for line in clipped[:10])  # before clipping to 0.1
    assert all(line["grad_norm"] is not None for line in clipped)
    assert [line["step"] for line in unclipped if line["grad_norm"] is not None] == [50]


def test_schedules_change_the_learning_rate(runs: Path) -> None:
    cosine, onecycle = ([line["lr"] for line in lines(runs, name, "train")] for name in ("cosine", "onecycle"))
    assert cosine[:5] == pytest.approx([0.0002, 0.0004, 0.0006, 0.0008, 0.001])
    assert cosine[-1] < 2e-5
    assert (onecycle[0], max(onecycle), onecycle[-1]) == pytest.approx((4e-4, 0.01, 4e-8), rel=0.01)


def test_dropout_differs_between_ranks_and_steps_and_repeats_with_the_seed(runs: Path) -> None:
    assert losses(runs, "dropout") == losses(runs, "dropout again")
    without = {value for line in lines(runs, "no dropout, no learning", "train") for value in line["loss_per_rank"]}
    with_dropout = {value for line in lines(runs, "dropout, no learning", "train") for value in line["loss_per_rank"]}
    assert max(without) - min(without) < 1e-5
    assert len(with_dropout) == 2 * STEPS
    assert max(with_dropout) - min(with_dropout) > 0.01


def test_a_compiled_step_computes_the_same_as_in_eager_mode(runs: Path, tmp_path: Path) -> None:
    """With dropout, clipping, a schedule and gradient accumulation; on two ranks and on a single one."""
    names = ["together", "together, compiled"]
    run_ranks(train_cases, 1, tmp_path, names, timeout_s=240)
    for folder in (runs, tmp_path):
        eager, compiled = (lines(folder, name, "train") for name in names)
        assert len(compiled) == STEPS
        for key in ("loss", "grad_norm", "lr"):
            assert [line[key] for line in compiled] == pytest.approx([line[key] for line in eager], rel=1e-4)
