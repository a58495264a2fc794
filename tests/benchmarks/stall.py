"""Time the stall of training by a checkpoint: `python -m tests.benchmarks.stall [SAVES]`; synthetic data, one process.

Every second window ends in a save. What a save costs is the time in which the loop stands still for the copy, and what
the window beside which it is written takes longer than the two without one around it.
"""

import statistics
import sys
import tempfile
import time

import torch

from fnet_dist.config.schema import Config
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.outcome import RunOutcomeWriter
from fnet_dist.run.run_dir import open_run, run_dir_of
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.loop import train_epoch
from fnet_dist.training.recorder import open_recorder
from fnet_dist.training.setup import build_data
from tests.benchmarks.steps import parts_of
from tests.helpers.config import FashionConfig


def main(saves: int) -> None:
    """Train until there were `saves` checkpoints, and print what they cost."""
    torch.set_flush_denormal(True)
    group = Group(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, Watchdog(0, 600, print) as guard:
        config = FashionConfig.model_validate(
            {
                "run": {"name": "stall", "root": folder, "epochs": 10_000},
                "data": {"dataset": "synthetic"},
                "tracking": {"wandb": "disabled"},
            }
        )
        attempt = claim_attempt(run_dir_of(config))
        open_run(config)
        copies, windows = measure(config, group, attempt, guard, saves)
    excess = [
        1000 * (beside - (before + after) / 2)
        for before, beside, after in zip(windows[1::2], windows[2::2], windows[3::2], strict=False)
    ]
    window_s = statistics.median(windows)
    total = statistics.median(copies) * 1000 + statistics.median(excess)
    print(
        f"{len(copies)} saves: copy {1000 * statistics.median(copies):.2f} ms (most {1000 * max(copies):.1f}), beside "
        f"it {statistics.median(excess):.2f} ms, together {total:.1f} ms in the median; a window takes {window_s:.2f} s"
    )


def measure(
    config: Config, group: Group, attempt: Attempt, guard: Watchdog, saves: int
) -> tuple[list[float], list[float]]:
    """Seconds of each copy, and of each window as if it had 300 steps."""
    data = build_data(config, group)
    parts, sampler = parts_of(config, group, data.train)
    state, step = parts.state, parts.step
    copies, windows = list[float](), list[float]()
    with open_recorder(config, RunOutcomeWriter(attempt), state, "loss", sampler.steps_per_epoch, print) as recorder:
        assert recorder is not None
        while len(copies) < saves:
            for window in train_epoch(step, sampler, data.train, state, StopFlag(), guard):
                recorder.record_window(window, state, StopFlag())
                if state.epoch_steps < 400 or len(window.steps) < 100:
                    continue  # an epoch's first and last windows are short
                windows.append(300 * window.seconds / len(window.steps))
                if len(windows) % 2 == 0:
                    began = time.perf_counter()
                    recorder.saver.save(state)
                    copies.append(time.perf_counter() - began)
            state.next_epoch()
    return copies, windows


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
