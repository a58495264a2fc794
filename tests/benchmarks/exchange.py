"""Time the gradient synchronisation of two ranks: `python -m tests.benchmarks.exchange [ROUNDS]`.

In turn, on both ranks at the same time, a block of each: our whole step; the step of a lone process over this rank's
local batch; our step without the exchange; one exchange of all gradients. The step
should cost little more than computing and exchanging by themselves. Then a lone process's step over the whole batch.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.shared_memory import open_shared_memory
from fnet_dist.recipes.fashion_mnist.dataset import build_dataset
from fnet_dist.recipes.fashion_mnist.model import build_model
from fnet_dist.recipes.fashion_mnist.settings import ModelConfig
from tests.benchmarks.steps import in_turn, steps_of
from tests.helpers.config import FashionConfig
from tests.helpers.ranks import run_ranks

STEPS = 100
BATCH_SIZES = (64, 512, 2048, 8192)


def blocks_of(group: Group, data: Dataset, batch_size: int) -> dict[str, Callable[[int], None]]:
    """Return the timed functions by name; each runs the number of steps it is given."""
    ours = steps_of(group, data, batch_size)
    gradients = [torch.zeros_like(parameter) for parameter in build_model(ModelConfig()).parameters()]
    flat = torch.zeros(sum(map(torch.numel, gradients)))
    shared = open_shared_memory(group, gradients)

    def without_exchange(count: int) -> None:
        with patch.object(GradientSync, "all_reduce", lambda sync: None):
            ours(count)

    def exchange(count: int) -> None:
        for _ in range(count):
            if shared is None:
                dist.all_reduce(flat)
            else:
                shared.put(gradients, group.world_size)
                shared.take()

    alone = Group(0, 1, group.device)
    of_one = steps_of(alone, data, batch_size)
    return {
        "step": ours,
        "compute": steps_of(alone, data, batch_size // group.world_size),
        "alone": without_exchange,
        "exchange": exchange,
        "of one rank": lambda count: of_one(count) if group.is_rank0 else None,
    }


def measure(group: Group, folder: Path, rounds: int) -> None:
    """Microseconds of each, by rank 0's clock; the ranks begin and end each block together."""
    data = build_dataset(FashionConfig.model_validate({"data": {"dataset": "synthetic"}}).data, "train", group.device)
    results = {}
    for batch_size in BATCH_SIZES:
        count = max(5, STEPS * 512 // max(512, batch_size))
        blocks = blocks_of(group, data, batch_size)
        results[batch_size] = in_turn(blocks, count, rounds, dist.barrier)
    if group.is_rank0:
        (folder / "us.json").write_text(json.dumps(results))


def main(rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, 2, Path(folder), rounds, timeout_s=600)
        results = json.loads((Path(folder) / "us.json").read_text())
    for batch_size, us in results.items():
        step, compute, as_a_rank, exchange, of_one = (np.array(values) for values in us.values())
        print(
            f"2 ranks, batch {batch_size}, us: step {np.median(step):.0f}, compute {np.median(compute):.0f} (as a rank "
            f"{np.median(as_a_rank):.0f}), exchange {np.median(exchange):.0f}; step / (compute + exchange) "
            f"{np.median(step / (compute + exchange)):.2f} (as a rank {np.median(step / (as_a_rank + exchange)):.2f};"
            f" at most 1.15); one rank {np.median(of_one):.0f}, speed-up {np.median(of_one / step):.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
