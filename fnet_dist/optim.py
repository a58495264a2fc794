"""Optimizers as torch has them, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim

from fnet_dist.config.schema import OptimConfig, ScheduleConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> optim.Optimizer:
    """torch's optimizer over all parameters of `model`, with torch's defaults except what `config` says.

    Fused where torch has a fused step on every device; its results may differ from the unfused in the last bit.
    """
    parameters = model.parameters()
    lr, weight_decay = config.lr, config.weight_decay
    match config.name:
        case "adam":
            return optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "adamw":
            return optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "sgd":
            return optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=config.momentum, fused=True)
        case "adagrad":
            return optim.Adagrad(parameters, lr=lr, weight_decay=weight_decay)
        case "adadelta":
            return optim.Adadelta(parameters, lr=lr, weight_decay=weight_decay)
        case "lbfgs":
            return optim.LBFGS(parameters, lr=lr)


def build_update(optimizer: optim.Optimizer) -> Callable[[], None]:
    """A function that moves the weights as `optimizer.step()` does, to the bit.

    torch's step finds the same tensors again each time, which on a CPU takes a third of the fused Adam's own time: here
    they are looked up once. Other optimizers, and steps in which a parameter has no gradient, go torch's way.
    """
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    [group, *others] = optimizer.param_groups
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if not isinstance(optimizer, optim.Adam) or not group["fused"] or group["amsgrad"] or others or len(kinds) > 1:
        return optimizer.step
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    state: object = None
    firsts, seconds, steps = list[Tensor](), list[Tensor](), list[Tensor]()

    @torch.no_grad()
    def update() -> None:
        nonlocal state, firsts, seconds, steps
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(optimizer.state) < len(parameters) or len(gradients) < len(parameters):
            optimizer.step()
            return
        if state is not optimizer.state:  # load_state_dict puts another in its place
            state = optimizer.state
            names = ("exp_avg", "exp_avg_sq", "step")
            firsts, seconds, steps = ([optimizer.state[each][name] for each in parameters] for name in names)
        [group] = optimizer.param_groups  # here too
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        kernel(
            parameters,
            gradients,
            firsts,
            seconds,
            [],
            steps,
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    return update


def learning_rate(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """The learning rate of `step` (from 1) of `total_steps`.

    constant: base_lr. cosine: half a cosine from base_lr to 0 (Loshchilov and Hutter 2017, SGDR, without restarts).
    onecycle: up from base_lr / 25 over 30 % of the steps, then down to base_lr / 250,000, both along cosines, as
    torch.optim.lr_scheduler.OneCycleLR does with its defaults but for momentum, which stays. Before that,
    `warmup_steps` steps of linear warm-up: base_lr / warmup_steps, 2 base_lr / warmup_steps, ...
    """
    if step <= config.warmup_steps:
        return base_lr * step / config.warmup_steps
    done = step - 1 - config.warmup_steps
    total = total_steps - config.warmup_steps
    if config.name == "cosine":
        return _cosine(base_lr, 0.0, done / total)
    if config.name == "onecycle":
        turn = 0.3 * total - 1
        if done <= turn:
            return _cosine(base_lr / 25, base_lr, done / turn)
        return _cosine(base_lr, base_lr / 25 / 1e4, (done - turn) / (total - 1 - turn))
    return base_lr


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
