"""What the exchange of gradients costs a step of two ranks: `python -m tests.benchmarks.exchange [ROUNDS]`.

In turn, on both ranks at the same time, a block of each: our whole step; the step of a lone process over this rank's
share; our step with a hook that sends nothing, where DDP is all that is added; one exchange of all gradients. The step
should cost little more than computing and exchanging by themselves. Then a lone process's step over the whole batch.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # not in torch's list of exports

from fnet_dist.batching import Dataset
from fnet_dist.config import Config
from fnet_dist.data import build_dataset
from fnet_dist.group import Group
from fnet_dist.sampler import GlobalBatchSampler, StepBatch
from fnet_dist.shared_memory import SharedMemory, share_memory
from fnet_dist.trainer import build_step
from tests.ranks import run_ranks

STEPS = 100
BATCH_SIZES = (64, 512, 2048, 8192)
GRADIENTS = 235_146


class Bucket:
    """All gradients at once, as DDP hands them to its hook."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self._gradients = gradients

    def buffer(self) -> torch.Tensor:
        return self._gradients

    def is_last(self) -> bool:
        return True


def steps_of(group: Group, data: Dataset, batch_size: int) -> Callable[[int], None]:
    """A function that takes so many steps."""
    config = Config.model_validate({"data": {"dataset": "synthetic", "global_batch_size": batch_size}})
    _, step = build_step(config, group, total_steps=1)
    sampler = GlobalBatchSampler(data, global_batch_size=batch_size, rank=group.rank, world_size=group.world_size)

    def endless() -> Iterator[tuple[int, StepBatch]]:
        number = 0
        while True:
            sampler.set_position(1 + number)
            for batch in sampler.steps():
                if batch.global_samples == batch_size:
                    number += 1
                    yield number, batch

    batches = endless()

    def take(count: int) -> None:
        some = list(islice(batches, count))
        read = data.batches(piece.indices for _, batch in some for piece in batch.pieces)
        for number, batch in some:
            step.take(number, batch, read)

    return take


def silent(shared: SharedMemory, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook that sends nothing: what is left is DDP itself."""
    future = torch.futures.Future[torch.Tensor]()
    future.set_result(bucket.buffer())
    return future


def blocks_of(group: Group, data: Dataset, batch_size: int) -> dict[str, Callable[[int], None]]:
    """What is timed, by name: each does as many steps as it is told."""
    ours = steps_of(group, data, batch_size)
    shared = share_memory(group, [torch.empty(GRADIENTS)])
    bucket: Any = Bucket(torch.zeros(GRADIENTS))

    def without_exchange(count: int) -> None:
        with patch.object(SharedMemory, "average", silent):
            ours(count)

    def exchange(count: int) -> None:
        for _ in range(count):
            if shared is None:
                dist.all_reduce(bucket.buffer())
            else:
                shared.average(bucket)

    alone = Group(0, 1, group.device)
    of_one = steps_of(alone, data, batch_size)
    return {
        "step": ours,
        "compute": steps_of(alone, data, batch_size // group.world_size),
        "in DDP": without_exchange,
        "exchange": exchange,
        "of one rank": lambda count: of_one(count) if group.is_main else None,
    }


def measure(group: Group, folder: Path, rounds: int) -> None:
    """Microseconds of each, by rank 0's clock; the ranks begin and end each block together."""
    data = build_dataset(Config.model_validate({"data": {"dataset": "synthetic"}}).data, "train", group.device)
    results = {}
    for batch_size in BATCH_SIZES:
        count = max(5, STEPS * 512 // max(512, batch_size))
        blocks = blocks_of(group, data, batch_size)
        us: dict[str, list[float]] = {name: [] for name in blocks}
        for _ in range(rounds + 1):
            for name, block in blocks.items():
                dist.barrier()
                started = time.perf_counter()
                block(count)
                dist.barrier()
                us[name].append(1e6 * (time.perf_counter() - started) / count)
        results[batch_size] = {name: values[1:] for name, values in us.items()}  # the first is to warm up
    if group.is_main:
        (folder / "us.json").write_text(json.dumps(results))


def main(rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, 2, Path(folder), rounds, timeout_s=600)
        results = json.loads((Path(folder) / "us.json").read_text())
    for batch_size, us in results.items():
        step, compute, in_ddp, exchange, of_one = (np.array(values) for values in us.values())
        print(
            f"2 ranks, batch {batch_size}, us: step {np.median(step):.0f}, compute {np.median(compute):.0f} (in DDP "
            f"{np.median(in_ddp):.0f}), exchange {np.median(exchange):.0f}; step / (compute + exchange) "
            f"{np.median(step / (compute + exchange)):.2f} (in DDP {np.median(step / (in_ddp + exchange)):.2f}; at most"
            f" 1.15); one rank {np.median(of_one):.0f}, speed-up {np.median(of_one / step):.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
