"""make bench: an epoch of ours beside the book's loop and beside a bare loop, in turn, on the same core.

Prints seconds of each round, medians, and the two ratios that fnet_dist promises. Needs the real data (FNET_DATA).
"""

import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn, optim
from torchvision import datasets, transforms

from fnet_dist import ledger
from fnet_dist.config import ModelConfig
from fnet_dist.model import build_model
from fnet_dist.run_dir import RunDir
from fnet_dist.runtime import Runtime
from fnet_dist.settings import load_config
from fnet_dist.stopping import StopFlag
from fnet_dist.trainer import train

ROUNDS = 5


def book(root: str) -> float:
    """Recipes 1 to 4 as printed: an image at a time through PIL, a host sync a step."""
    torch.set_flush_denormal(False)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    images = datasets.FashionMNIST(root, train=True, transform=transform)
    loader = torch.utils.data.DataLoader(images, batch_size=64, shuffle=True)
    model = build_model(ModelConfig())
    criterion, optimizer = nn.NLLLoss(), optim.Adam(model.parameters(), lr=3e-3)
    started = time.perf_counter()
    running_loss = 0.0
    for image, label in loader:
        optimizer.zero_grad()
        image = image.view(image.shape[0], -1)
        loss = criterion(model(image), label)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return time.perf_counter() - started


def bare(root: str) -> float:
    """The floor: what a hand-written loop for this one purpose does, with every trick that ours has."""
    torch.set_flush_denormal(True)
    data = datasets.FashionMNIST(root, train=True)
    images, labels = data.data.view(-1, 784), data.targets
    model = build_model(ModelConfig())
    optimizer = optim.Adam(model.parameters(), lr=3e-3, fused=True)
    order = torch.randperm(60_000)
    started = time.perf_counter()
    losses = []
    for first in range(0, 60_000, 64):
        index = order[first : first + 64]
        inputs = images.index_select(0, index).float().div_(255).sub_(0.5).div_(0.5)
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(inputs), labels.index_select(0, index))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.stack(losses).mean().item()
    return time.perf_counter() - started


def ours(root: str) -> float:
    """The trainer with its ledger, as `python -m fnet_dist.train` runs it; the epoch's seconds as it records them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = ["--config", "jobs/baseline.toml", "--run.root", folder, "--run.name", "bench", "--run.epochs", "1"]
        train(load_config([*argv, "--data.root", root, "--tracking.wandb", "disabled"]), Runtime(), StopFlag())
        lines = list(ledger.read(RunDir(Path(folder) / "bench").ledger))
    seconds: float = next(line["seconds"] for line in lines if line["kind"] == "epoch")
    return seconds


def main() -> int:
    """Run the rounds and print the table."""
    root = os.environ.get("FNET_DATA", str(Path("~/.pytorch/F_MNIST_data").expanduser()))
    torch.set_num_threads(1)
    contenders: dict[str, Callable[[str], float]] = {"book's loop": book, "bare loop": bare, "fnet_dist": ours}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            seconds[name].append(run(root))
    print(f"one epoch, batch 64, one thread; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    for name, values in seconds.items():
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"  {name:<12} median {statistics.median(values):5.2f} s   rounds {each}")
    times_faster = statistics.median(a / b for a, b in zip(seconds["book's loop"], seconds["fnet_dist"], strict=True))
    overhead = statistics.median(b / a for a, b in zip(seconds["bare loop"], seconds["fnet_dist"], strict=True)) - 1
    print(
        f"  {times_faster:.1f} times as fast as the book's loop (promised: 5), {overhead:+.0%} over bare (at most +15%)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
