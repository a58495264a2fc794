"""torch's optimizers by name, and the learning rate as a function of the step."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.optim.adam import adam

from fnet_dist.config.schema import OptimConfig, ScheduleConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> optim.Optimizer:
    """Return torch's optimizer over all parameters of `model`, with torch's defaults except what `config` says.

    Fused where torch has a fused kernel on every device. Its results may differ from the unfused in the last bit.
    """
    _skip_dynamo()
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
    [group, *others] = optimizer.param_groups
    if not isinstance(optimizer, optim.Adam) or group["amsgrad"] or others:
        return lambda: step(optimizer)
    parameters: list[Tensor] = group["params"]
    state: object = None
    averages, squares, steps = list[Tensor](), list[Tensor](), list[Tensor]()

    @torch.no_grad()
    def update() -> None:
        nonlocal state, averages, squares, steps
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(optimizer.state) < len(parameters) or len(gradients) < len(parameters):
            step(optimizer)  # creates the state in the first step, and skips parameters without a gradient
            return
        if state is not optimizer.state:  # load_state_dict replaces it
            state = optimizer.state
            names = ("exp_avg", "exp_avg_sq", "step")
            averages, squares, steps = ([optimizer.state[each][name] for each in parameters] for name in names)
        [group] = optimizer.param_groups  # here, because load_state_dict replaces this too
        beta1, beta2 = group["betas"]
        keys = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "fused", "decoupled_weight_decay")
        options = {key: group[key] for key in keys}
        adam(parameters, gradients, averages, squares, [], steps, beta1=beta1, beta2=beta2, **options)

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
