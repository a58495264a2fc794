"""The model and its loss as one module, in eager mode or compiled. training/window.py makes the loss of each rank."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.errors import ConfigError
from fnet_dist.loss import Loss


class ModelWithLoss(nn.Module):
    """(inputs, targets) -> (loss sum, weight), two 0-dim tensors: what DDP and torch.compile wrap."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: str | None = None) -> None:
        """With `autocast`, a device type, the model's matrix products are bf16 on it."""
        super().__init__()
        self.model = model
        self.loss = loss
        self.autocast = autocast

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        with nullcontext() if self.autocast is None else torch.autocast(self.autocast, dtype=torch.bfloat16):
            outputs = self.model(inputs)
        return self.loss(outputs, targets)


def build_model_with_loss(model: nn.Module, loss: Loss, config: ParallelConfig, device: torch.device) -> ModelWithLoss:
    """Return `model` and `loss` as a step calls them. Raise ConfigError if compiling for the CPU needs a compiler."""
    forward = ModelWithLoss(model, loss, device.type if config.precision == "bf16" else None)
    if config.compile:
        if device.type == "cpu":
            _check_compiler()
        # Not dynamic: microbatches have few sizes. fallback_random: dropout draws the numbers of eager mode.
        forward.compile(dynamic=False, options={"fallback_random": True, "triton.cudagraphs": device.type == "cuda"})
    return forward


def _check_compiler() -> None:
    """Raise ConfigError if torch finds no C++ compiler. At the first step torch would print a hundred lines instead."""
    # Private, but only torch knows where it looks. Here, because the import takes a second.
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # torch has moved them: the first step tells
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"parallel.compile true needs a C++ compiler: {error}; install one (Debian: apt install g++), or use "
            "--parallel.compile false"
        ) from None
