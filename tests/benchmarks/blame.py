"""Noise and cost of the ranks' compute times: `python -m tests.benchmarks.blame [WINDOWS] [FILE]`; synthetic data.

Records each rank's compute time in WINDOWS windows of healthy training at 2 and 4 ranks, prints how often a straggler
would have been detected, and writes the noise into FILE, from which tests/fnet_dist/distributed/test_stragglers.py
draws. Then measures what the timing costs a step of 2 ranks at a global batch of 64, the shortest there is.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.step_times import StepTimer
from fnet_dist.distributed.stragglers import RECENT_WINDOWS, detect_straggler
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.stop import StopFlag, StoppedError
from fnet_dist.training import loop, window
from fnet_dist.training.window import Window
from tests.helpers.config import FashionConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train_in_group

SETTINGS = [(2, 64), (4, 64), (2, 4096), (4, 4096), (2, 16384)]  # ranks and global batch


def record(group: Group, folder: Path, batch: int, count: int) -> None:
    """Train until there were `count` windows; rank 0 writes the compute times into a file."""
    values: list[list[float]] = []
    stop = StopFlag()

    def train_epoch(*arguments: Any) -> Iterator[Window]:
        for closed in loop.train_epoch(*arguments):
            values.append([round(ms, 3) for ms in closed.by_rank["busy_ms"].tolist()])
            if len(values) >= count:
                stop.reason = "signal_int"
            yield closed

    config = FashionConfig.model_validate(
        {
            "run": {"name": "noise", "root": str(folder), "epochs": 100_000},
            "data": {"dataset": "synthetic", "global_batch_size": batch},
            "tracking": {"wandb": "disabled"},
        }
    )
    with patch("fnet_dist.training.epochs.train_epoch", train_epoch), suppress(StoppedError):
        train_in_group(group, config, stop=stop)
    if group.is_rank0:
        (folder / "own_ms.json").write_text(json.dumps(values))


def cost(group: Group, folder: Path, count: int) -> None:
    """Train as in `record`, and let rank 0 write down how long each part of the timing takes within it, us a step."""
    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            spent.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
            return result

        return call

    names = ("start", "read", "compute", "gradients_ready", "end")
    parts: list[tuple[Any, str]] = [(StepTimer, name) for name in names]
    parts.append((window, "_measured_times"))
    with ExitStack() as patches:
        for owner, name in parts:
            patches.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        record(group, folder, 64, count)
    if group.is_rank0:
        steps = len(spent["end"])
        detect = timed("detect_straggler", detect_straggler)
        for _ in range(count):
            detect([[1.0, 1.1]] * RECENT_WINDOWS)
        us = {name: most_of(values) / steps for name, values in spent.items()}
        (folder / "cost.json").write_text(json.dumps(us))


def most_of(values: list[float]) -> float:
    """Their sum without the longest hundredth, in which the system ran something else."""
    return sum(sorted(values)[: len(values) - len(values) // 100])


def measure_cost(count: int) -> None:
    """Print the timing's cost, as a part of the step in the same run."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(cost, 2, Path(folder), count, timeout_s=60 + 2 * count)
        us = json.loads((Path(folder) / "cost.json").read_text())
        run = run_dir_of(FashionConfig.model_validate({"run": {"name": "noise", "root": folder}}))
        step_us = 1000 * statistics.median(
            row["step_ms"] for row in metrics_log.read(run.metrics_log) if row["kind"] == "window"
        )
    parts = ", ".join(f"{name} {value:.2f}" for name, value in us.items())
    print(
        f"timing: {sum(us.values()):.1f} us of a step of {step_us:.0f} us, {sum(us.values()) / step_us:.2%} "
        f"(at most 0.5 %); {parts}"
    )


def main(count: int, into: Path) -> None:
    """Noise, then cost."""
    noise = []
    for world_size, batch in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(record, world_size, Path(folder), batch, count, timeout_s=30 + 2 * count)
            values = json.loads((Path(folder) / "own_ms.json").read_text())
        noise.append({"world_size": world_size, "global_batch_size": batch, "own_ms": values})
        ratios = sorted(max(row) / statistics.median_low(row) for row in values)
        named = sum(
            detect_straggler(values[max(0, i - RECENT_WINDOWS) : i]).slowest_rank is not None
            for i in range(1, len(values) + 1)
        )
        print(
            f"{world_size} ranks, batch {batch}: compute time {statistics.median(map(min, values)):.2f} ms; max over "
            f"median {ratios[len(ratios) // 2]:.3f} in the median, {ratios[len(ratios) * 95 // 100]:.3f} in 95 %, "
            f"most {ratios[-1]:.2f}; {len(values)} windows, {named} with a name",
            flush=True,
        )
        into.write_text(json.dumps(noise) + "\n")
    measure_cost(count=40)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, Path(sys.argv[2] if len(sys.argv) > 2 else "/tmp/noise.json"))
