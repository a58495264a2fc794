"""The least that a step of this network can take on a device: a bare loop, and the whole step as one CUDA graph.

A benchmark only: one graph has no window, no log and no checkpoint, and its step cannot look at the host.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig

STEPS, ROUNDS = 200, 5


def bare_step(inputs: Tensor, targets: Tensor, batch_size: int) -> Callable[[], None]:
    """Return a step on `inputs` (n, 784) and `targets` (n,): the next samples of an order that lies on the device."""
    device, count = inputs.device, len(inputs)
    model = build_model(ModelConfig()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True, capturable=device.type == "cuda")
    order, offsets = torch.randperm(count, device=device), torch.arange(batch_size, device=device)
    first = torch.zeros((), dtype=torch.int64, device=device)

    def step() -> None:
        indices = order.index_select(0, (first + offsets) % count)
        optimizer.zero_grad(set_to_none=True)
        nll_loss(model(inputs.index_select(0, indices)), targets.index_select(0, indices)).backward()
        optimizer.step()
        first.add_(batch_size)

    return step


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Return `step` captured as one CUDA graph; on the CPU, `step` itself."""
    if not torch.cuda.is_available():
        return step
    warm_up = torch.cuda.Stream()  # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step_us(step: Callable[[], None]) -> float:
    """Return the microseconds of a step, the median over ROUNDS blocks of STEPS."""
    us = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        us.append(1e6 * (time.perf_counter() - began) / STEPS)
    return statistics.median(us[1:])
