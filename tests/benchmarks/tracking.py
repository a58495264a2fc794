"""Time training with and without W&B: `python -m tests.benchmarks.tracking [WINDOWS]`; synthetic data, batch 64.

One training, tracked offline at the defaults. In every second window of half a second the tracking process and the
SDK's own stand still, as if tracking were disabled; what they then have not done they do in the next. Half of what that
takes longer than the mean of those before and after is what tracking costs a window.
"""

import os
import signal
import statistics
import sys
import tempfile

import torch

from fnet_dist.config.schema import Config
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.processes import children
from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.outcome import RunOutcomeWriter
from fnet_dist.run.run_dir import open_run, run_dir_of, write_manifest
from fnet_dist.run.stop import StopFlag
from fnet_dist.tracking.client import start_tracker
from fnet_dist.tracking.offline_files import rows_written
from fnet_dist.training.loop import train_epoch
from fnet_dist.training.recorder import Recorder, open_recorder
from fnet_dist.training.setup import build_data
from tests.benchmarks.steps import parts_of
from tests.helpers.config import FashionConfig

STEPS = 300  # of a window; that many take about half a second


def main(count: int) -> None:
    """Train through `count` windows, and print what those with tracking took longer."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    group = Group(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, Watchdog(0, 600, print) as guard:
        run = {"name": "r", "root": folder, "epochs": 10_000}
        config = FashionConfig.model_validate(
            {
                "run": run,
                "data": {"dataset": "synthetic"},
                "tracking": {"wandb": "offline", "alerts": "best", "log_predictions": True},
            }
        )
        attempt = claim_attempt(run_dir_of(config))
        open_run(config)
        seconds = measure(config, group, attempt, guard, count)
    costs = [
        (beside / ((before + after) / 2) - 1) / 2
        for before, beside, after in zip(seconds[::2], seconds[1::2], seconds[2::2], strict=False)
    ]
    low, middle, high = statistics.quantiles(costs, n=4)
    error = 1.25 * statistics.stdev(costs) / len(costs) ** 0.5
    print(
        f"{len(costs)} windows of {STEPS} steps of batch 64 ({statistics.median(seconds):.3f} s) with tracking, and as "
        f"many without: it costs {middle:+.2%} in the median (at most 1 %; standard error {error:.2%}), middle half "
        f"{low:+.2%}, {high:+.2%}"
    )


def measure(config: Config, group: Group, attempt: Attempt, guard: Watchdog, count: int) -> list[float]:
    """Seconds of `count` windows and one more, in turn without tracking and with it."""
    data = build_data(config, group)
    parts, sampler = parts_of(config, group, data.train)
    write_manifest(attempt.run, {"dataset": {"train_count": len(data.train)}})
    state, step = parts.state, parts.step
    seconds: list[float] = []
    with (
        start_tracker(config.tracking, is_rank0=True) as started,
        open_recorder(
            config, RunOutcomeWriter(attempt), state, "loss", sampler.steps_per_epoch, print, started
        ) as recorder,
    ):
        assert isinstance(recorder, Recorder)
        tracker = children(os.getpid())[0]
        while len(seconds) <= count:
            settled = rows_written(attempt.run) > 0
            for window in train_epoch(step, sampler, data.train, state, StopFlag(), guard):
                recorder.record_window(window, state, StopFlag())
                if settled and len(window.steps) == STEPS and len(seconds) <= count:
                    seconds.append(window.seconds)
                left = sampler.steps_per_epoch - state.epoch_steps
                state.window_steps = max(1, min(STEPS, left))
                with_tracking = len(seconds) % 2 == 1 or not settled
                stop_or_go_on(tracker, signal.SIGCONT if with_tracking else signal.SIGSTOP)
            state.next_epoch()
            state.window_steps = STEPS
        stop_or_go_on(tracker, signal.SIGCONT)
    return seconds


def stop_or_go_on(tracker: int, number: signal.Signals) -> None:
    """The tracking process, its wandb-core and what that started."""
    for pid in [tracker, *children(tracker), *(pid for core in children(tracker) for pid in children(core))]:
        os.kill(pid, number)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
