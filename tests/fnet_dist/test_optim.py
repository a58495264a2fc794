"""torch's own optimizers by name, and schedules equal to torch's."""

import copy

import pytest
import torch
import torch._dynamo  # torch's first optimizer imports it, and it leaves an environment variable behind
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from fnet_dist.config.schema import OPTIMIZER_OPTIONS, OptimConfig, ScheduleConfig
from fnet_dist.optim import build_optimizer, build_update, learning_rate

CLASSES = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "radam": optim.RAdam,
    "nadam": optim.NAdam,
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
    "lbfgs": optim.LBFGS,
}
TOTAL_STEPS = (*range(1, 11), 37, 100, 938)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def train(optimizer, model, steps=5):
    """Take a few steps on made-up data, and return the weights after them as one vector."""
    inputs = torch.linspace(-1, 1, 20).reshape(5, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss.item()

    for _ in range(steps):
        optimizer.step(closure)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("name", CLASSES)
def test_each_optimizer_is_the_class_of_torch_with_its_defaults(name):
    ours = build_optimizer(OptimConfig(name=name), two_layers())
    theirs = CLASSES[name](two_layers().parameters())
    assert type(ours) is CLASSES[name]
    defaults = [{key: value for key, value in each.defaults.items() if key != "fused"} for each in (ours, theirs)]
    assert defaults[0] == defaults[1]


@pytest.mark.parametrize("name", CLASSES)
def test_each_optimizer_moves_all_weights_as_that_of_torch_does(name):
    model, other = two_layers(), two_layers()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    ours = train(build_optimizer(OptimConfig(name=name, lr=0.02), model), model)
    theirs = train(CLASSES[name](other.parameters(), lr=0.02), other)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert (ours != before).all()


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "lbfgs"])
def test_the_settings_reach_the_optimizer(name):
    values = {"momentum": 0.9, "nesterov": True, "betas": (0.8, 0.95), "eps": 1e-5}
    options = {key: values[key] for key, (names, _) in OPTIMIZER_OPTIONS.items() if name in names}
    given = {"lr": 0.5, "weight_decay": 0.25, **options}
    found = build_optimizer(OptimConfig(name=name, **given), two_layers()).param_groups[0]
    assert {key: found[key] for key in given} == given
    assert len(found["params"]) == 4


def rates(config, total_steps, base_lr=0.1):
    return [learning_rate(config, base_lr, step, total_steps) for step in range(1, total_steps + 1)]


def torch_rates(build, total_steps, base_lr=0.1):
    """Return the learning rates that torch's scheduler sets for each step of a run."""
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=base_lr)
    scheduler = build(optimizer)
    found = []
    for step in range(1, total_steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if step < total_steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("total_steps", TOTAL_STEPS)
def test_onecycle_equals_that_of_torch_at_every_step(total_steps):
    found = torch_rates(
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps, cycle_momentum=False), total_steps
    )
    assert rates(ScheduleConfig(name="onecycle"), total_steps) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("total_steps", TOTAL_STEPS)
def test_cosine_equals_that_of_torch_at_every_step(total_steps):
    found = torch_rates(lambda optimizer: CosineAnnealingLR(optimizer, T_max=total_steps), total_steps)
    assert rates(ScheduleConfig(name="cosine"), total_steps) == pytest.approx(found, rel=1e-9)


def test_constant_is_constant():
    assert rates(ScheduleConfig(), 7, base_lr=0.003) == [0.003] * 7


@pytest.mark.parametrize("name", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [1, 4, 10])
def test_the_warm_up_is_linear_and_the_schedule_covers_the_remaining_steps(name, warmup_steps):
    found = rates(ScheduleConfig(name=name, warmup_steps=warmup_steps), 10)
    assert found[:warmup_steps] == pytest.approx([0.1 * step / warmup_steps for step in range(1, warmup_steps + 1)])
    assert found[warmup_steps:] == rates(ScheduleConfig(name=name), 10 - warmup_steps)


def test_a_run_may_end_within_its_warm_up():
    assert rates(ScheduleConfig(name="cosine", warmup_steps=100), 3) == pytest.approx([0.001, 0.002, 0.003])


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "lbfgs"])  # whose step takes a closure
def test_an_update_has_the_same_bits_as_the_optimizers_step(name):
    """Also if the learning rate changes, after a state is loaded, and if a parameter has no gradient."""
    model, other = two_layers(), two_layers()
    config = OptimConfig(name=name, lr=0.02, weight_decay=0.01)
    optimizer, reference = build_optimizer(config, model), build_optimizer(config, other)
    update = build_update(optimizer)
    for step in range(9):
        if step == 4:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for module, each in ((model, optimizer), (other, reference)):
            each.param_groups[0]["lr"] = 0.02 / (1 + step)
            each.zero_grad()
            module(torch.linspace(-1, 1, 20).reshape(5, 4)).square().sum().backward()
            if step == 6:
                module[2].bias.grad = None
        update()
        reference.step()
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert str(optimizer.state_dict()) == str(reference.state_dict())
