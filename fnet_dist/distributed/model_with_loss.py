"""What a piece of a batch goes through: the model and its loss, in eager mode or compiled."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fnet_dist.config.schema import ParallelConfig
from fnet_dist.errors import ConfigError
from fnet_dist.loss import Loss


class ModelWithLoss(nn.Module):
    """(inputs, targets) -> (the loss's sum, its weight), 0-dim."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: str | None = None) -> None:
        """`autocast` is the type of device on which products are bf16, if any."""
        super().__init__()
        self.model = model
        self.loss = loss
        self.autocast = autocast

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with self._precision():
            outputs = self.model(inputs)
        return self.loss(outputs, targets)

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(self.autocast, dtype=torch.bfloat16)


def build_model_with_loss(model: nn.Module, loss: Loss, config: ParallelConfig, device: torch.device) -> ModelWithLoss:
    """`model` and `loss` as a step calls them, with torch.compile over both if `config` says so.

    Shapes are fixed: a share has few sizes. Dropout draws what it draws in eager mode. On CUDA forward and backward
    are replayed as CUDA graphs. Raises ConfigError if there is no compiler for the CPU's code.
    """
    forward = ModelWithLoss(model, loss, device.type if config.precision == "bf16" else None)
    if config.compile:
        if device.type == "cpu":
            _find_compiler()
        forward.compile(dynamic=False, options={"fallback_random": True, "triton.cudagraphs": device.type == "cuda"})
    return forward


def _find_compiler() -> None:
    """torch would say it at the first step, in a hundred lines."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second to import, and needed here only
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"parallel.compile true needs a C++ compiler: {error}; install one (Debian: apt install g++), or use "
            "--parallel.compile false"
        ) from None
