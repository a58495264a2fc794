"""One epoch of the same training as others write it, and as we do: each in a process (or ranks) of its own.

    torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.contenders NAME GLOBAL_BATCH_SIZE

Prints a JSON object: the epoch's seconds, from the first batch to the last step, start-up and imports left out; the
mean training loss over all ranks; the most memory that rank 0 has held, MB. Same data, seed, batch, optimizer (Adam, lr
3e-3), one thread a rank; the model is ours, so that only what is around it differs.
"""

import contextlib
import io
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torch.utils.data import Dataset as MapStyleDataset

from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig
from fnet_dist.run.exit import exit_process

LR, SEED = 3e-3, 0
Epoch = tuple[float, float]
Samples = MapStyleDataset[Any]
ROOT = os.environ.get("FNET_DATA", str(Path("~/.pytorch/F_MNIST_data").expanduser()))
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = torch.cuda.device_count() >= WORLD_SIZE  # a GPU for each rank, or all of them on the CPU
DEVICE = torch.device("cuda", RANK) if ON_GPU else torch.device("cpu")


def images() -> Samples:
    """The book's data path: an image at a time through PIL."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    return datasets.FashionMNIST(ROOT, train=True, transform=transform)


def tensors() -> Samples:
    """All samples normalised in memory, as a TensorDataset."""
    from torchvision import datasets

    data = datasets.FashionMNIST(ROOT, train=True)
    return TensorDataset(data.data.view(-1, 784).float().div_(127.5).sub_(1), data.targets)


def flat(inputs: Tensor) -> Tensor:
    """(n, 784)."""
    return inputs.view(inputs.shape[0], -1)


def now() -> float:
    """Seconds, once the device is through with what it was given."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)
    return time.perf_counter()


def as_printed(loader: Any, model: nn.Module, epochs: int = 1, sampler: Any = None) -> Epoch:
    """Recipe 4's loop, which the tutorial's is too but for set_epoch: a host sync a step."""
    criterion, optimizer = nn.NLLLoss(), optim.Adam(model.parameters(), lr=LR)
    started = now()
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        running_loss = 0.0
        for image, label in loader:
            optimizer.zero_grad()
            loss = criterion(model(flat(image.to(DEVICE))), label.to(DEVICE))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return now() - started, running_loss / len(loader)


def book(batch_size: int, epochs: int = 1) -> Epoch:
    """Recipes 1 to 4 as printed."""
    loader = DataLoader(images(), batch_size=batch_size, shuffle=True)
    return as_printed(loader, build_model(ModelConfig()).to(DEVICE), epochs)


def tutorial(batch_size: int) -> Epoch:
    """DDP as the official tutorial has it: DataLoader, DistributedSampler, the book's data path."""
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    data = images()
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=batch_size // WORLD_SIZE, shuffle=False, sampler=sampler)
    return as_printed(loader, DistributedDataParallel(build_model(ModelConfig()).to(DEVICE)), sampler=sampler)


def lightning(batch_size: int, data: Callable[[], Samples]) -> Epoch:
    """Lightning as its first page has it: the Trainer's defaults (progress bar, logger, checkpoint); loss logged."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = build_model(ModelConfig()), list[Tensor]()

        def on_train_epoch_start(self) -> None:
            self.started = now()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = nn.functional.nll_loss(self.model(flat(batch[0])), batch[1])
            self.log("train_loss", loss)
            self.losses.append(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.seconds = now() - self.started

        def configure_optimizers(self) -> optim.Optimizer:
            return optim.Adam(self.parameters(), lr=LR)

    module = Module()
    strategy = "ddp" if WORLD_SIZE > 1 else "auto"
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if ON_GPU else "cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        default_root_dir=os.environ["BENCH_FOLDER"],
    )
    trainer.fit(module, DataLoader(data(), batch_size=batch_size // WORLD_SIZE, shuffle=True))
    return module.seconds, torch.stack(module.losses).mean().item()


def accelerate(batch_size: int, data: Callable[[], Samples]) -> Epoch:
    """Accelerate: prepare, and its backward."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not ON_GPU)
    model = build_model(ModelConfig())
    loader = DataLoader(data(), batch_size=batch_size // WORLD_SIZE, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optim.Adam(model.parameters(), lr=LR), loader)
    started, losses = now(), list[Tensor]()
    for image, label in loader:
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(flat(image)), label)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return now() - started, torch.stack(losses).mean().item()


def bare(batch_size: int) -> Epoch:
    """The floor: a loop for this one purpose with every trick that ours has; no metrics log, tracking, checkpoint."""
    from torchvision import datasets

    torch.set_flush_denormal(True)
    data = datasets.FashionMNIST(ROOT, train=True)
    pixels, labels = data.data.view(-1, 784).to(DEVICE), data.targets.to(DEVICE)
    model = build_model(ModelConfig()).to(DEVICE)
    forward: nn.Module = model
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if ON_GPU else "gloo")
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optim.Adam(model.parameters(), lr=LR, fused=True)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    started, losses = now(), list[Tensor]()
    for first in range(0, 60_000, batch_size):
        index = order[first : first + batch_size][RANK::WORLD_SIZE].to(DEVICE, non_blocking=True)
        inputs = pixels.index_select(0, index).div(127.5).sub_(1)
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(forward(inputs), labels.index_select(0, index))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return now() - started, torch.stack(losses).mean().item()


def ours(batch_size: int) -> Epoch:
    """The trainer with everything on: metrics log, tracking (offline), checkpoints; the epoch is the log's."""
    from fnet_dist.config.load import load_config
    from fnet_dist.distributed.launch_env import read_launch_env
    from fnet_dist.run import metrics_log
    from fnet_dist.run.run_dir import RunDir
    from fnet_dist.run.stop import StopFlag
    from fnet_dist.training.trainer import train

    folder = Path(os.environ["BENCH_FOLDER"])
    argv = ["--config", "jobs/baseline.toml", "--run.root", str(folder), "--run.name", "bench", "--run.epochs", "1"]
    argv += ["--data.root", ROOT, "--data.global-batch-size", str(batch_size), "--tracking.wandb", "offline"]
    argv += ["--parallel.device", DEVICE.type]
    train(load_config(argv), read_launch_env(), StopFlag())
    line = next(line for line in metrics_log.read(RunDir(folder / "bench").metrics_log) if line["kind"] == "epoch")
    return line["seconds"], line["train_loss"]


CONTENDERS: dict[str, Callable[[int], Epoch]] = {
    "book's loop": book,
    "tutorial's DDP": tutorial,
    "Lightning": lambda size: lightning(size, images),
    "Lightning, in memory": lambda size: lightning(size, tensors),
    "Accelerate": lambda size: accelerate(size, images),
    "Accelerate, in memory": lambda size: accelerate(size, tensors),
    "bare loop": bare,
    "fnet_dist": ours,
}


def main(name: str, batch_size: int) -> None:
    """Run one contender on this rank; rank 0 prints what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        seconds, loss = CONTENDERS[name](batch_size)
    if dist.is_initialized():  # of peers, which know their own rank's alone
        mean = torch.tensor(loss / WORLD_SIZE, device=DEVICE)
        dist.all_reduce(mean)
        loss = mean.item()
    if RANK == 0:
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "memory_mb": memory_mb}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    exit_process(0)  # gloo's threads may outlive the group of a peer, and would end this process by SIGABRT
