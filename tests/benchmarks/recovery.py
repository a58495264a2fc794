"""From the kill of a rank to the next new step: `python -m tests.benchmarks.recovery [KILLS]`; real data, 2 ranks.

`fnet run` trains with ranks that its fork server forks, then with ranks that it starts by themselves
(`--parallel.fork-ranks false`). A rank is killed KILLS times (20), each time once the run has trained something: the
time from the kill to the first new step is printed, and what the server and a rank hold in memory of their own.
"""

import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fnet_dist.processes import children
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir
from jobs.verification.supervised_run import SupervisedRun, ranks_of, supervised, wait_until

AT_MOST_S = 2.0  # the median with the fork server, on CPUs
JOB = [
    *("jobs/quickstart.toml", "--data.dataset", "fashion-mnist", "--run.epochs", "1000"),
    *("--tracking.wandb", "disabled"),
    *("--checkpoint.every-steps", "100", "--data.global-batch-size", "512", "--nproc-per-node", "2"),
]


def last_step(run: RunDir) -> tuple[int, int]:
    """Return the attempt and the number of the last new step; steps that are trained again do not count."""
    lines = metrics_log.tail(run.metrics_log, lambda lines: any(line["kind"] == "train" for line in lines))
    return max(((line["attempt"], line["step"]) for line in lines if line["kind"] == "train"), default=(0, 0))


def own_mib(pid: int) -> float:
    """Return the memory that this process shares with no other, in MiB."""
    kib = re.findall(r"^Private_\w+:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return sum(map(int, kib)) / 1024


def seconds_to_recover(folder: Path, kills: int, *options: str) -> list[float]:
    """Train, kill rank 1 `kills` times, and return the seconds from each kill to the first new step."""
    took = []
    with supervised(SupervisedRun(RunDir(folder / f"run{len(options)}"), [*JOB, *options])) as run:
        launcher = run.start()
        for _ in range(kills):
            goal = last_step(run.run)[1] + 150  # beyond a checkpoint: each attempt gains something
            wait_until(lambda goal=goal: last_step(run.run)[1] >= goal, f"step {goal}", launcher)
            attempt, killed = last_step(run.run)[0], time.monotonic()
            os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
            wait_until(lambda attempt=attempt: last_step(run.run)[0] > attempt, "a new step", launcher, every_s=0.01)
            took.append(time.monotonic() - killed)
        processes = {"rank 0": ranks_of(launcher.pid)[0]} | ({} if options else {"server": children(launcher.pid)[0]})
        print("  memory of its own, MiB:", {name: round(own_mib(pid)) for name, pid in processes.items()}, flush=True)
    return took


def main(kills: int) -> int:
    """Print both series; return 1 if the median with the fork server is over AT_MOST_S."""
    with tempfile.TemporaryDirectory() as folder:
        medians = []
        for name, options in (("forked", ()), ("started by themselves", ("--parallel.fork-ranks", "false"))):
            took = seconds_to_recover(Path(folder), kills, *options)
            medians.append(statistics.median(took))
            print(f"{name:22} median {medians[-1]:.2f} s of {kills} kills ({min(took):.2f} to {max(took):.2f})")
    return int(medians[0] > AT_MOST_S)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
