"""Promise 1: a step's global batch, its gradient and its loss do not depend on how many ranks share it.

The ranks are real gloo processes. Each world size is started once and runs every case; rank 0's figures are compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.schema import Config, DataConfig
from fnet_dist.data.datasets import Dataset, DatasetInfo
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.dataset import build_dataset
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.model_with_loss import ModelWithLoss
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.loss import build_loss
from fnet_dist.model import build_model
from fnet_dist.optim import build_optimizer, build_update, learning_rate
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.evaluation import evaluate
from fnet_dist.training.loop import StepSchedule, train_epoch
from fnet_dist.training.step import Step
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.processes

STEPS = 200
CLASS_WEIGHTS = [1.0, 2.0, 0.5, 1.0, 1.5, 0.1, 3.0, 1.0, 0.7, 1.2]
EVERYTHING = {
    "loss": {"class_weights": CLASS_WEIGHTS},
    "parallel": {"grad_accum_steps": 4},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}


@dataclass(frozen=True)
class Case:
    """A float64 run; an epoch has `batches` full global batches and one of `left` samples."""

    optim: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    left: int = 2
    batches: int = 9
    steps: int = STEPS
    weights_within: float = 1e-12
    own_loss: bool = False

    def config(self) -> Config:
        return Config.model_validate({"optim": self.optim, **self.more})


CASES = {
    "adam": Case({"name": "adam", "lr": 3e-3}),
    "adam, everything on": Case({"name": "adam", "lr": 3e-3, "max_grad_norm": 0.5}, EVERYTHING),
    "adamw, everything on": Case({"name": "adamw", "lr": 3e-3, "max_grad_norm": 0.5}, EVERYTHING, left=3),
    "sgd, everything on": Case({"name": "sgd", "lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5}, EVERYTHING, left=3),
    "adagrad, everything on": Case({"name": "adagrad", "max_grad_norm": 0.5}, EVERYTHING),
    "adadelta, everything on": Case({"name": "adadelta", "max_grad_norm": 0.5}, EVERYTHING),
    # LBFGS divides by differences between gradients and amplifies a last bit: to 1e-12 within 50 steps where batches
    # change; on one batch losses agree as all others do, weights in its flat directions to 1e-9.
    "lbfgs, class weights": Case({"name": "lbfgs", "lr": 0.05}, {"loss": {"class_weights": CLASS_WEIGHTS}}, steps=20),
    "lbfgs, one batch": Case(
        {"name": "lbfgs", "lr": 0.1}, {"loss": {"class_weights": CLASS_WEIGHTS}}, 0, 1, weights_within=1e-9
    ),
    "a loss of the user's own": Case({"name": "adam", "lr": 3e-3}, own_loss=True),
}


class Recorded(Dataset):
    """Random float64 samples, which remember the indices they were asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(DatasetInfo("random", sha256="", class_names=("",) * 10, config=DataConfig()))
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(count, 20, generator=generator, dtype=torch.float64)
        self.labels = (self.inputs[:, :10] + torch.randn(count, 10, generator=generator)).argmax(1)
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(indices.tolist())
        return self.inputs[indices], self.labels[indices]


def own_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a user might write, knowing nothing of ranks: later classes count more."""
    importance = 1 + targets.to(outputs.dtype) / 10
    return (importance * nn.functional.nll_loss(outputs, targets, reduction="none")).sum(), importance.sum()


@dataclass(frozen=True)
class Parts:
    state: TrainState
    step: Step
    sampler: GlobalBatchSampler


def build(group: Group, config: Config, dataset: Dataset, model: nn.Module, loss: Callable[..., Any]) -> Parts:
    optimizer = build_optimizer(config.optim, model)
    microbatches = config.parallel.grad_accum_steps
    sampler = GlobalBatchSampler(
        dataset, global_batch_size=64, rank=group.rank, world_size=group.world_size, microbatches=microbatches
    )
    step = Step(
        exchange=GradientSync(ModelWithLoss(model, loss), group, config.parallel),
        loss=loss,
        optimizer=optimizer,
        update=build_update(optimizer),
        group=group,
        lr_of=lambda number: learning_rate(config.schedule, config.optim.lr, number, STEPS),
        seed=0,
        max_grad_norm=config.optim.max_grad_norm,
    )
    return Parts(TrainState(model, optimizer), step, sampler)


def step_losses(parts: Parts, dataset: Dataset, max_steps: int) -> Iterator[float]:
    """Train up to `max_steps`, over epochs, and give each step's loss."""
    stop, pace = StopFlag(), StepSchedule(max_steps)
    with Watchdog(0, 60, print) as guard:
        while parts.state.step < max_steps:
            for window in train_epoch(parts.step, parts.sampler, dataset, parts.state, stop, guard, pace):
                yield from (one.loss for one in window.steps)
            if parts.state.step < max_steps:
                parts.state.next_epoch()


def in_float64(group: Group, case: Case) -> dict[str, Any]:
    """Each step's loss, the weights in the end, and which samples this rank asked for."""
    config, dataset = case.config(), Recorded(64 * case.batches + case.left)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10), nn.LogSoftmax(dim=1)).double()
    parts = build(group, config, dataset, model, own_loss if case.own_loss else build_loss(config.loss))
    for group_of_parameters in parts.step.optimizer.param_groups:
        if "max_iter" in group_of_parameters:
            group_of_parameters["max_iter"] = 2  # of LBFGS's 20: each is a pass with three collectives
    losses = torch.tensor(list(step_losses(parts, dataset, case.steps)), dtype=torch.float64)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return {"losses": losses, "weights": weights, "asked": dataset.asked, "pieces": config.parallel.grad_accum_steps}


def in_float32(group: Group) -> dict[str, Any]:
    """The network itself: each step's loss over an epoch of Adam on the 10,000 images of the smaller split, then its
    accuracy on them."""
    config = Config.model_validate({"optim": {"lr": 3e-3}})
    dataset = build_dataset(DataConfig(dataset="synthetic"), "test", group.device)
    torch.manual_seed(0)
    parts = build(group, config, dataset, build_model(config.model), build_loss(config.loss))
    losses = list(step_losses(parts, dataset, parts.sampler.steps_per_epoch))
    evaluation = evaluate(parts.state.model, parts.step.loss, dataset, group, 64)
    return {"losses": losses, "accuracy": evaluation.accuracy, "count": evaluation.count}


def gradients(group: Group, states: list[dict[str, Tensor]]) -> list[Tensor]:
    """The gradient at each state, over a global batch of its own."""
    config = Config()
    dataset = build_dataset(DataConfig(dataset="synthetic"), "test", group.device)
    parts = build(group, config, dataset, build_model(config.model), build_loss(config.loss))
    found = []
    for number, (state, batch) in enumerate(zip(states, parts.sampler.steps(), strict=False), 1):
        parts.state.model.load_state_dict(state)
        parts.state.optimizer.zero_grad()
        parts.step.backward(number, batch, dataset.batches(microbatch.indices for microbatch in batch.microbatches))
        found.append(torch.cat([gradient.flatten() for gradient in parts.step.exchange.gradients()]))
    return found


def states_along_an_epoch() -> list[dict[str, Tensor]]:
    """50 states of the network, every 18th step of an epoch that this process trains."""
    config = Config.model_validate({"optim": {"lr": 3e-3}})
    group = Group(0, 1, torch.device("cpu"))
    dataset = build_dataset(DataConfig(dataset="synthetic"), "train", group.device)
    torch.manual_seed(0)
    parts = build(group, config, dataset, build_model(config.model), build_loss(config.loss))
    parts.state.window_steps = 1
    states = []
    for number, batch in zip(range(900), parts.sampler.steps(), strict=False):
        parts.step.take(number + 1, batch, dataset.batches(microbatch.indices for microbatch in batch.microbatches))
        if number % 18 == 0:
            states.append({name: tensor.clone() for name, tensor in parts.state.model.state_dict().items()})
    return states


def everything(group: Group, folder: Path) -> None:
    """What each rank runs; a rank keeps its results in a file."""
    results: dict[str, Any] = {name: in_float64(group, case) for name, case in CASES.items()}
    results["gradients"] = gradients(group, torch.load(folder / "states"))
    results["epoch"] = in_float32(group)
    torch.save(results, folder / f"world{group.world_size}_rank{group.rank}")


Worlds = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[(1, 2, 3), pytest.param((1, 4), marks=pytest.mark.soak)], ids=str)
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Results by world size, then by rank."""
    folder = tmp_path_factory.mktemp("worlds")
    torch.save(states_along_an_epoch(), folder / "states")
    for world_size in request.param:
        run_ranks(everything, world_size, folder, timeout_s=150)
    return {
        world_size: [torch.load(folder / f"world{world_size}_rank{rank}") for rank in range(world_size)]
        for world_size in request.param
    }


@pytest.mark.timeout(400)  # the first of these tests trains all worlds
@pytest.mark.parametrize("case", CASES)
def test_in_float64_losses_and_weights_agree_to_1e_12_over_200_steps(worlds: Worlds, case: str) -> None:
    alone = worlds[1][0][case]
    assert len(alone["losses"]) == CASES[case].steps
    assert alone["losses"][-10:].mean() < alone["losses"][:10].mean()
    for world_size in [*worlds][1:]:
        together = worlds[world_size][0][case]
        torch.testing.assert_close(together["losses"], alone["losses"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together["weights"], alone["weights"], rtol=0, atol=CASES[case].weights_within)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("lbfgs")])
def test_ranks_together_ask_for_the_samples_that_one_rank_asks_for_at_the_same_step(worlds: Worlds, case: str) -> None:
    def steps(world_size: int) -> list[set[int]]:
        found = []
        for rank in worlds[world_size]:
            asked, microbatches = rank[case]["asked"], rank[case]["pieces"]
            found.append([asked[first : first + microbatches] for first in range(0, len(asked), microbatches)])
        return [
            {index for share in shares for microbatch in share for index in microbatch}
            for shares in zip(*found, strict=True)
        ]

    alone = steps(1)
    assert len(alone) == STEPS
    assert [len(batch) for batch in alone[:10]] == [64] * 9 + [CASES[case].left]
    for world_size in [*worlds][1:]:
        assert steps(world_size) == alone


def test_in_float32_the_gradient_agrees_to_1e_5_at_50_states_along_a_run(worlds: Worlds) -> None:
    alone = worlds[1][0]["gradients"]
    assert len(alone) == 50
    for world_size in [*worlds][1:]:
        for together, gradient in zip(worlds[world_size][0]["gradients"], alone, strict=True):
            assert (together - gradient).norm() <= 1e-5 * gradient.norm()


def test_in_float32_an_epoch_begins_alike_and_ends_close(worlds: Worlds) -> None:
    alone = worlds[1][0]["epoch"]
    for world_size in [*worlds][1:]:
        together = worlds[world_size][0]["epoch"]
        assert together["losses"][:10] == pytest.approx(alone["losses"][:10], rel=1e-5)
        assert len(together["losses"]) == len(alone["losses"]) == 157
        assert sum(together["losses"]) / 157 == pytest.approx(sum(alone["losses"]) / 157, abs=0.02)
        assert together["accuracy"] == pytest.approx(alone["accuracy"], abs=0.02)
        assert together["count"] == alone["count"] == 10_000
