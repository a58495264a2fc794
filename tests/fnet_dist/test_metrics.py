"""Metrics are those of the whole data set, whatever batches their sums come from."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from fnet_dist.metrics import Classification, Language, Regression, directions


def over_batches(metrics, outputs, targets, sizes):
    """Return the values, from sums that are added over batches of these sizes."""
    total = {}
    for part, expected in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        for name, value in metrics.sums(part, expected).items():
            assert value.shape == ()
            total[name] = total.get(name, 0.0) + value.item()
    return metrics.values(total)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_accuracy_and_top_k_count_targets_once(random):
    outputs, targets = torch.randn(100, 7, generator=random), torch.randint(7, (100,), generator=random)
    order = outputs.argsort(dim=1, descending=True)
    expected = {f"top{k}": (order[:, :k] == targets[:, None]).any(1).float().mean().item() for k in (2, 5)}
    expected = {"accuracy": (order[:, 0] == targets).float().mean().item(), **expected}
    assert over_batches(Classification(top=(2, 5)), outputs, targets, [33, 33, 34]) == pytest.approx(expected)
    targets[:50] = -100  # ignored
    half = over_batches(Classification(), outputs, targets, [100])["accuracy"]
    assert half == pytest.approx((order[50:, 0] == targets[50:]).float().mean().item())


def test_regression_is_that_of_all_elements(random):
    targets = 5 + torch.randn(90, 3, generator=random, dtype=torch.float64)
    outputs = targets + 0.1 * torch.randn(90, 3, generator=random, dtype=torch.float64)
    error = outputs - targets
    r2 = 1 - (error.square().sum() / (targets - targets.mean()).square().sum()).item()
    expected = {"rmse": error.square().mean().sqrt().item(), "mae": error.abs().mean().item(), "r2": r2}
    assert over_batches(Regression(), outputs, targets, [40, 50]) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match=r"outputs \(90, 1\) and targets \(90, 3\) differ in shape"):
        Regression().sums(outputs[:, :1], targets)
    assert math.isnan(over_batches(Regression(), torch.ones(4), torch.ones(4), [4])["r2"])


def test_perplexity_is_that_of_all_tokens(random):
    logits, tokens = torch.randn(12, 9, 5, generator=random), torch.randint(5, (12, 9), generator=random)
    tokens[:, 7:] = -100
    expected = math.exp(cross_entropy(logits.flatten(0, 1), tokens.flatten()).item())
    assert over_batches(Language(), logits, tokens, [5, 7])["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_directions_are_those_of_all_metrics_in_order():
    assert directions((Classification(top=(5,)), Regression())) == {
        "accuracy": "higher", "top5": "higher", "rmse": "lower", "mae": "lower", "r2": "higher",
    }  # fmt: skip
