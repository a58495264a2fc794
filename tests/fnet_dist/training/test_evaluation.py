"""Three ranks evaluate each sample once with the same model, also with fewer samples than ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnet_dist.data.datasets import Dataset, DatasetInfo
from fnet_dist.distributed.process_group import Group, gather_rows
from fnet_dist.metrics import Classification
from fnet_dist.recipes.fashion_mnist.settings import DataConfig
from fnet_dist.training.evaluation import Evaluator, evaluate
from tests.fnet_dist.training.test_features import PoisonedOnce, train_an_epoch
from tests.helpers.config import FashionConfig
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.helpers.training import classifier_loss

pytestmark = pytest.mark.processes


class WhichSample(Dataset):
    """A data set whose sample i is the number i, of class 1 if 7 divides it."""

    def __init__(self, count: int) -> None:
        super().__init__(DatasetInfo("which", sha256="", class_names=("no", "yes"), config=DataConfig()))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        return indices.float()[:, None], (indices % 7 == 0).long()


def everything_on_three_ranks(group: Group) -> None:
    for count in (10_007, 2):  # with 2 samples, one rank has none
        loss, metrics = classifier_loss(FashionConfig().loss), (Classification(),)
        evaluation = evaluate(Evaluator(Counting(), loss, metrics, WhichSample(count), group, 64))
        assert evaluation.count == count
        assert torch.equal(evaluation.true, (torch.arange(count) % 7 == 0).long())
        assert torch.equal(evaluation.predicted, torch.arange(count) % 2)
        accuracy = evaluation.metrics["accuracy"]
        assert accuracy == int((evaluation.predicted == evaluation.true).sum()) / count
        assert evaluation.loss == pytest.approx(-math.log(0.75) * accuracy - math.log(0.25) * (1 - accuracy))
    check_targets_that_are_no_class_have_no_cross_entropy(group)
    check_a_rank_without_a_sample_has_no_loss(group)
    check_buffers_are_broadcast_before_evaluation(group)


class Counting(nn.Module):
    """A model that predicts class 1 for every odd sample, with probability 0.75."""

    def forward(self, x: Tensor) -> Tensor:
        odd = x[:, 0].long() % 2
        return torch.log(torch.stack([0.75 - 0.5 * odd, 0.25 + 0.5 * odd], dim=1))


class Ignored(WhichSample):
    """Every third sample has the target -1, which the loss ignores."""

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(indices, key)
        return inputs, targets.where(indices % 3 > 0, -1)


class IgnoringLoss(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.nll_loss(outputs, targets, ignore_index=-1, reduction="sum"), (targets >= 0).sum()


def check_targets_that_are_no_class_have_no_cross_entropy(group: Group) -> None:
    evaluation = evaluate(Evaluator(Counting(), IgnoringLoss(), (Classification(ignore=-1),), Ignored(301), group, 64))
    assert evaluation.losses is not None
    right = torch.where(evaluation.predicted == evaluation.true, 0.75, 0.25).double()
    expected = (-right.log()).where(torch.arange(301) % 3 > 0, 0.0)
    assert torch.allclose(evaluation.losses, expected)


def check_a_rank_without_a_sample_has_no_loss(group: Group) -> None:
    """Check the epoch's last batch, of 2 samples for 3 ranks."""
    seen: list[Any] = []
    train_an_epoch(group, PoisonedOnce(here=False), RandomDataset(DataConfig(), 130, Fault("none")), seen)
    assert [[loss is None for loss in one.loss_per_rank] for one in seen] == [[False] * 3] * 8 + [[False, False, True]]
    assert all(math.isfinite(one.loss) for one in seen)


def check_buffers_are_broadcast_before_evaluation(group: Group) -> None:
    """Check that ranks, each with its own running statistics after an epoch, evaluate with those of rank 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Linear(16, 10), nn.LogSoftmax(dim=1))
    dataset = RandomDataset(DataConfig(), 128, Fault("none"))
    step = train_an_epoch(group, model, dataset, [])
    statistics = model.get_buffer("1.running_mean")
    first, *others = gather_rows(group, statistics)
    assert not any(torch.equal(other, first) for other in others)
    evaluate(Evaluator(model, step.loss, (), dataset, group, 64))
    assert all(torch.equal(other, first) for other in gather_rows(group, statistics))


def test_three_ranks_evaluate_each_sample_once_with_the_same_model() -> None:
    run_ranks(everything_on_three_ranks, 3)
