"""The loss as sum and weight: over any split of a batch it adds up to torch's mean."""

import random

import pytest
import torch
from torch import nn

from fnet_dist.data.datasets import DatasetInfo, InMemoryDataset
from fnet_dist.errors import ConfigError
from fnet_dist.loss import build_classifier_loss
from fnet_dist.recipes.fashion_mnist.settings import LossConfig
from tests.helpers.training import classifier_loss

CLASSES = 10


@pytest.fixture
def repeat(request):
    """Return the command that repeats a failed random test."""
    return f'repeat: python -m pytest "{request.node.nodeid}"'


def random_config(rng):
    name = rng.choice(["nll", "cross_entropy"])
    weights = [rng.choice([0.0, 0.1, 1.0, 7.5]) for _ in range(CLASSES - 1)] + [2.0]
    return LossConfig(
        name=name,
        class_weights=tuple(weights) if rng.random() < 0.6 else None,
        label_smoothing=rng.choice([0.0, 0.1, 0.6]) if name == "cross_entropy" else 0.0,
    )


def torch_loss(config, dtype):
    """Return torch's criterion for the same settings."""
    weight = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=dtype)
    if config.name == "nll":
        return nn.NLLLoss(weight)
    return nn.CrossEntropyLoss(weight, label_smoothing=config.label_smoothing)


def random_batch(seed, n, dtype, log=True):
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(n, CLASSES, generator=generator, dtype=dtype)
    targets = torch.randint(0, CLASSES, (n,), generator=generator)
    targets[0] = CLASSES - 1  # its weight is never 0
    return outputs.log_softmax(1) if log else outputs, targets


@pytest.mark.parametrize("seed", range(60))
def test_sums_and_weights_of_any_split_give_the_mean_and_gradient_of_torch(seed, repeat):
    rng = random.Random(seed)
    config = random_config(rng)
    loss = classifier_loss(config)
    n = rng.randint(2, 100)
    outputs, targets = random_batch(seed, n, torch.float64, log=config.name == "nll")
    outputs.requires_grad_()
    lengths = []
    while sum(lengths) < n:
        lengths.append(rng.randint(0, n - sum(lengths)))
    parts = [loss(*part) for part in zip(outputs.split(lengths), targets.split(lengths), strict=True)]
    case = f"{config}, split {lengths}; {repeat}"
    assert all(total.shape == weight.shape == () for total, weight in parts), case
    mean = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    expected = torch_loss(config, torch.float64)(outputs, targets)
    assert abs(mean.item() - expected.item()) < 1e-12 * max(1, abs(expected.item())), case
    (ours,), (theirs,) = torch.autograd.grad(mean, outputs), torch.autograd.grad(expected, outputs)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15), case


@pytest.mark.parametrize("weights", [None, (1.0,) * 9 + (2.0,)], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", ["nll", "cross_entropy"])
def test_sum_and_weight_have_the_type_of_the_outputs(name, weights):
    loss = classifier_loss(LossConfig(name=name, class_weights=weights))
    for dtype in (torch.float32, torch.float64):
        total, weight = loss(*random_batch(0, 64, dtype))
        assert (total.dtype, weight.dtype) == (dtype, dtype)


@pytest.mark.parametrize("weights", [None, (1.0,) * 9 + (2.0,)], ids=["unweighted", "weighted"])
def test_logits_in_bf16_are_summed_in_float32(weights):
    """A sum of 4096 in bf16 has steps of 16 to 32; the logits are rounded, the sum is not."""
    loss = classifier_loss(LossConfig(name="cross_entropy", class_weights=weights))
    outputs, targets = random_batch(0, 4096, torch.float32, log=False)
    rounded = outputs.bfloat16()
    total, weight = loss(rounded, targets)
    expected, expected_weight = loss(rounded.double(), targets)
    assert (total.dtype, weight.dtype) == (torch.float32, torch.float32)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weight.item() == expected_weight.item()


def test_a_batch_whose_classes_all_have_weight_0_has_sum_and_weight_0():
    loss = classifier_loss(LossConfig(class_weights=(0.0,) * 9 + (1.0,)))
    outputs, _ = random_batch(0, 5, torch.float64)
    assert [value.item() for value in loss(outputs, torch.zeros(5, dtype=torch.int64))] == [0, 0]


def test_the_weight_is_the_count_only_without_class_weights():
    """A step saves an all-reduce if this is promised."""
    outputs, targets = random_batch(0, 7, torch.float64)
    plain, weighted = classifier_loss(LossConfig()), classifier_loss(LossConfig(class_weights=(1.0,) * 10))
    assert (plain.weight_is_count, weighted.weight_is_count) == (True, False)
    assert plain(outputs, targets)[1].item() == weighted(outputs, targets)[1].item() == 7


def test_the_class_weights_move_with_the_loss_to_a_device():
    loss = classifier_loss(LossConfig(class_weights=(1.0,) * 10)).to("meta")
    assert loss.class_weights.device.type == "meta"


def test_class_weights_for_another_number_of_classes_are_refused():
    data = InMemoryDataset(torch.zeros(1), torch.zeros(1), torch.device("cpu"), DatasetInfo("none", "", ("a", "b")))
    with pytest.raises(ConfigError, match=r"loss.class_weights has 10 numbers, the data 2 classes"):
        build_classifier_loss(LossConfig(class_weights=(1.0,) * 10), data)
