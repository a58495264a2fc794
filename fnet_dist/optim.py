"""torch's optimizers by name, and the learning rate as a function of the step."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.adam import adam

from fnet_dist.config.schema import OPTIMIZER_OPTIONS, OptimConfig, ScheduleConfig
from fnet_dist.errors import ConfigError

_ADAM_OPTIONS = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "fused", "decoupled_weight_decay")


_CLASSES: Mapping[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "radam": optim.RAdam,
    "nadam": optim.NAdam,
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
}
Group = dict[str, Any]


def build_optimizer(
    config: OptimConfig, model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None
) -> optim.Optimizer:
    """Return torch's optimizer over the trained parameters of `model`, with torch's defaults except what `config` says.

    `groups` are a recipe's, as Recipe.parameter_groups returns them. Fused where torch has a fused kernel on every
    device; its results may differ from the unfused in the last bit. Raise ConfigError for groups that do not fit.
    """
    _skip_dynamo()
    parameters = _groups(config, model, groups)
    if config.name == "lbfgs":
        if len(parameters) > 1:
            raise ConfigError("optim.name lbfgs takes one group of parameters, found several; use another optimizer")
        return optim.LBFGS(parameters, lr=config.lr)
    given = {key: value for key in OPTIMIZER_OPTIONS if (value := getattr(config, key))}
    if config.name in ("adam", "adamw", "sgd"):
        given["fused"] = True
    return _CLASSES[config.name](parameters, lr=config.lr, weight_decay=config.weight_decay, **given)


def _groups(config: OptimConfig, model: nn.Module, given: Iterable[Mapping[str, Any]] | None) -> list[Group]:
    """Return the optimizer's groups of parameters, each with its `lr_scale`; frozen parameters are in none."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ConfigError("the model has no parameter to train: each has requires_grad False")
    groups: list[Group] = []
    for group in [{"params": list(trained.values())}] if given is None else given:
        if unknown := group.keys() - {"params", "lr_scale", "weight_decay"}:
            raise ConfigError(f"parameter_groups: {min(unknown)!r}, expected params, lr_scale and weight_decay")
        parameters = [each for each in group["params"] if each.requires_grad]
        groups.append({"lr_scale": 1.0, **group, "params": parameters})
    counts = Counter(id(each) for group in groups for each in group["params"])
    for name, each in trained.items():
        if (count := counts.pop(id(each), 0)) != 1:
            raise ConfigError(f"parameter_groups: {name} is in {count} groups, expected one")
    if counts:
        raise ConfigError("parameter_groups: a tensor that is no parameter of the model")
    if not config.decay_all:  # of a layer, biases and the scales of norms are vectors
        split = ([each.ndim > 1 for each in group["params"]] for group in groups)
        groups = [
            {**group, "params": [*compress(group["params"], chosen)], **({} if decays else {"weight_decay": 0.0})}
            for group, is_matrix in zip(groups, split, strict=True)
            for decays, chosen in ((True, is_matrix), (False, [not each for each in is_matrix]))
        ]
    return [group for group in groups if group["params"]]


def _skip_dynamo() -> None:
    """Let optimizers be built, saved and loaded without importing torch._dynamo: that is a third of a start, 2.4 s.

    Each method that torch hides from torch.compile imports it in its first call, unless this attribute names what to
    call instead (torch/_compile.py). Without the attribute nothing changes but the time.
    """
    for method in vars(optim.Optimizer).values():
        if (function := getattr(method, "__wrapped__", None)) is not None:
            function.__dynamo_disable = function


def build_update(optimizer: optim.Optimizer) -> Callable[[], None]:
    """Return a function that moves the weights as `optimizer.step()` does, with the same bits.

    It calls `step` without torch's decorators, which would import torch._dynamo (see _skip_dynamo).
    For Adam and AdamW it calls the public function behind `step`, with lists of tensors that are looked up once. `step`
    looks them up in each call: 7 % of a training step at batch 64, 2 % at 512 (one thread). To call torch's private
    fused kernel itself would gain another 3 %, which is not worth it.
    """
    step: Callable[[optim.Optimizer], None] = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    if not isinstance(optimizer, optim.Adam) or any(group["amsgrad"] for group in optimizer.param_groups):
        return lambda: step(optimizer)
    parameters: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    count = sum(map(len, parameters))
    state: object = None
    moments = list[list[list[Tensor]]]()

    @torch.no_grad()
    def update() -> None:
        nonlocal state, moments
        gradients = [[each.grad for each in group if each.grad is not None] for group in parameters]
        if len(optimizer.state) < count or sum(map(len, gradients)) < count:
            step(optimizer)  # creates the state in the first step, and skips parameters without a gradient
            return
        if state is not optimizer.state:  # load_state_dict replaces it
            state, names = optimizer.state, ("exp_avg", "exp_avg_sq", "step")
            moments = [[[optimizer.state[each][name] for each in group] for name in names] for group in parameters]
        # `param_groups` is looked up here, because load_state_dict replaces it too.
        for group, of_group, (averages, squares, steps), options in zip(
            parameters, gradients, moments, optimizer.param_groups, strict=True
        ):
            beta1, beta2 = options["betas"]
            chosen = {key: options[key] for key in _ADAM_OPTIONS}
            adam(group, of_group, averages, squares, [], steps, beta1=beta1, beta2=beta2, **chosen)

    return update


def learning_rate(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (from 1) of `total_steps`.

    First `warmup_steps` steps of linear warm-up: base_lr / warmup_steps, 2 base_lr / warmup_steps, ... Then
    constant: base_lr. cosine: half a cosine from base_lr to 0 (Loshchilov and Hutter 2017, SGDR, without restarts).
    onecycle: up from base_lr / 25 over 30 % of the steps, then down to base_lr / 250,000, both along cosines, as
    torch.optim.lr_scheduler.OneCycleLR with its defaults, but with constant momentum.

    A function of the step rather than torch's schedulers: resuming then needs no scheduler state.
    """
    if step <= config.warmup_steps:
        return base_lr * step / config.warmup_steps
    done = step - 1 - config.warmup_steps
    total = total_steps - config.warmup_steps
    if config.name == "cosine":
        return _cosine(base_lr, 0.0, done / total)
    if config.name == "onecycle":
        peak = 0.3 * total - 1
        if done <= peak:
            return _cosine(base_lr / 25, base_lr, done / peak)
        return _cosine(base_lr, base_lr / 25 / 1e4, (done - peak) / (total - 1 - peak))
    return base_lr


def _cosine(start: float, end: float, fraction: float) -> float:
    """Return the value at `fraction` (0 to 1) of half a cosine from `start` to `end`."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
