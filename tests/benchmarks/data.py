"""Time the reading of data: `python -m tests.benchmarks.data [ROUNDS]`; synthetic, one process, batch 64 by default.

First training from 6,000 samples to 6,000,000: time per sample, the sampler's memory, and what the sampler adds to
start-up from 1 rank to 1,024. Then, in turn, the streamed data path beside torch's plain DataLoader loop, both with two
workers, and with samples in memory. Last, what seeding the random generators adds to a streamed sample, and augmenting
on the device to one in memory.
"""

import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as MapStyleDataset

from fnet_dist.data.datasets import Dataset, DatasetInfo, InMemoryDataset, MapStyle, StreamedDataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.process_group import Group
from fnet_dist.recipes.fashion_mnist.dataset import flip_and_shift
from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig
from fnet_dist.seeding import sample_random, seed_sample
from tests.benchmarks.steps import in_turn, steps_of
from tests.helpers.config import FashionConfig

SIZES = (6_000, 60_000, 600_000, 6_000_000)
WORLD_SIZES = (1, 2, 64, 1024)
STEPS = 90  # of a block: fewer than an epoch of the smallest has
CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
NOISE = DatasetInfo("noise", sha256="", class_names=tuple("0123456789"), config=FashionConfig().data)


def in_memory(count: int) -> Dataset:
    """So many images of noise; of the many, the same few thousand again and again, so that making them is quick."""
    few = torch.randint(0, 256, (6_000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = few.repeat(count // len(few), 1, 1, 1)
    return InMemoryDataset(
        images,
        torch.arange(count) % 10,
        CPU,
        NOISE,
        transform=lambda part, key, indices: part.div(127.5).sub_(1),
    )


def plain(loader: DataLoader[Any]) -> Callable[[int], None]:
    """The loop that everybody writes, with torch's fused Adam."""
    model = build_model(ModelConfig())
    optimizer = optim.Adam(model.parameters(), fused=True)

    def take(count: int) -> None:
        for inputs, targets in islice(loader, count):
            optimizer.zero_grad()
            nn.functional.nll_loss(model(inputs), targets).backward()
            optimizer.step()

    return take


def sizes(rounds: int) -> None:
    """Cost against the number of samples, and of ranks."""
    data = {count: in_memory(count) for count in SIZES}
    found = in_turn({count: steps_of(ALONE, each, 64) for count, each in data.items()}, STEPS, 5 * rounds)
    for count, us in found.items():
        sampler = GlobalBatchSampler(data[count], global_batch_size=64)
        began = time.perf_counter()
        permutation = sampler.permutation()
        order_ms = 1000 * (time.perf_counter() - began)
        starts = []
        for world_size in WORLD_SIZES:
            began = time.perf_counter()
            of_many = GlobalBatchSampler(
                data[count], global_batch_size=4096, rank=world_size - 1, world_size=world_size
            )
            next(of_many.steps())
            starts.append(f"{1000 * (time.perf_counter() - began):.1f}")
        print(
            f"{count:9,} samples: {statistics.median(us) / 64:.2f} us a sample; an epoch's order takes "
            f"{order_ms:.1f} ms and {permutation.nbytes / 1e6:.2f} MB a rank; to the first batch at "
            f"{WORLD_SIZES} ranks {', '.join(starts)} ms"
        )


def streams(rounds: int) -> None:
    """Ours beside torch's, samples from workers and from memory; the workers' start counts."""
    images, labels = torch.rand(60_000, 784), torch.arange(60_000) % 10
    samples = TensorDataset(images, labels)
    for batch_size in (64, 512):
        streamed = StreamedDataset(cast("MapStyle", samples), 2, CPU, NOISE)
        loaders = [
            DataLoader(cast("MapStyleDataset[Any]", samples), batch_size=batch_size, shuffle=True, num_workers=workers)
            for workers in (2, 0)
        ]
        blocks = {
            "ours, streamed": steps_of(ALONE, streamed, batch_size),
            "plain DataLoader, 2 workers": plain(loaders[0]),
            "plain DataLoader, no worker": plain(loaders[1]),
            "ours, in memory": steps_of(ALONE, in_memory(60_000), batch_size),
        }
        found = in_turn(blocks, 60_000 // batch_size, rounds)
        ours = found["ours, streamed"]
        print(f"batch {batch_size}, an epoch of 60,000 samples:")
        for name, us in found.items():
            ratio = statistics.median(theirs / our for theirs, our in zip(us, ours, strict=True))
            epoch_s = statistics.median(us) / 1e6 * 60_000 / batch_size
            print(f"  {name}: {epoch_s:.2f} s, {ratio:.2f} times as long as ours, streamed")


def randomness(rounds: int) -> None:
    """The cost of random numbers that belong to the sample: streamed, and on the device."""
    count = 20_000
    found: dict[str, list[float]] = {"seeding a streamed sample": [], "flip and shift on the device": []}
    images = torch.randint(0, 256, (500, 1, 28, 28), dtype=torch.uint8)
    for _ in range(5 * rounds):
        began = time.perf_counter()
        for index in range(count):
            seed_sample(12345, index)
        seeded = time.perf_counter()
        for first in range(0, count, len(images)):
            flip_and_shift(images, sample_random(12345, torch.arange(first, first + len(images)), 3))
        ended = time.perf_counter()
        for name, seconds in zip(found, (seeded - began, ended - seeded), strict=True):
            found[name].append(1e6 * seconds / count)
    for name, us in found.items():
        print(f"{name}: {statistics.median(us):.1f} us ({min(us):.1f} to {max(us):.1f})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    often = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    sizes(often)
    streams(often)
    randomness(often)
