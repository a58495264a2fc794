"""Time `parallel.numerics invariant` against `fast`: `python -m tests.benchmarks.invariant [ROUNDS]`.

Two ranks, in turn a block of steps each: parallel.numerics fast; invariant with a logical shard a rank; with 8 of them.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch.distributed as dist

from fnet_dist.distributed.process_group import Group
from fnet_dist.recipes.fashion_mnist.dataset import build_dataset
from tests.benchmarks.steps import in_turn, steps_of
from tests.helpers.config import FashionConfig
from tests.helpers.ranks import run_ranks

BATCH_SIZES = (64, 512, 2048)
# Logical shards -> the most that a step may take longer than a fast one, by batch size.
AT_MOST = {2: {64: 0.05, 512: 0.05, 2048: 0.05}, 8: {512: 0.60, 2048: 0.40}}


def measure(group: Group, folder: Path, rounds: int) -> None:
    """Microseconds of a step of each, by rank 0's clock."""
    data = build_dataset(FashionConfig.model_validate({"data": {"dataset": "synthetic"}}).data, "train", group.device)
    results = {}
    for batch_size in BATCH_SIZES:
        count = max(10, 51_200 // max(batch_size, 512))
        blocks = {"fast": steps_of(group, data, batch_size)}
        blocks |= {
            str(shards): steps_of(group, data, batch_size, numerics="invariant", logical_shards=shards)
            for shards in AT_MOST
        }
        results[batch_size] = in_turn(blocks, count, rounds, dist.barrier)
    if group.is_rank0:
        (folder / "us.json").write_text(json.dumps(results))


def main(rounds: int) -> int:
    """Print the table; 0 if every cost is as small as promised."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, 2, Path(folder), rounds, timeout_s=600)
        results = json.loads((Path(folder) / "us.json").read_text())
    kept = True
    for batch_size, us in results.items():
        fast = np.array(us["fast"])
        words = [f"2 ranks, batch {batch_size}: fast {np.median(fast):.0f} us a step"]
        for shards, limits in AT_MOST.items():
            cost = float(np.median(np.array(us[str(shards)]) / fast)) - 1
            at_most = limits.get(int(batch_size))
            kept = kept and (at_most is None or cost <= at_most)
            promised = "" if at_most is None else f" (at most {at_most:.0%})"
            words.append(f"invariant with {shards} shards {cost:+.1%}{promised}")
        print("; ".join(words))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 15))
