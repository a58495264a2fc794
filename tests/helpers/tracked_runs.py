"""Start tracked runs, compute from the metrics log the rows that W&B must show, and read back what it was sent."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from wandb.util import get_core_path

from fnet_dist.processes import is_running
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, planned_length, read_json
from tests.helpers.processes import JOBS_RUN, TRAINER, Ended, children, start, wait_until
from tests.helpers.wandb_runs import Run
from tests.helpers.wandb_server import WandbServer

EVERY = 7  # steps between rows; few epochs of a test's job end on one
# An epoch has 60 steps of some 10 ms: long enough to be killed in the middle.
SETTINGS = ("--data.dataset", "synthetic", "--data.global-batch-size", "1000", "--checkpoint.every-steps", "20")
SETTINGS += ("--run.epochs", "1000", "--tracking.log-every-steps", str(EVERY), "--parallel.timeout-s", "60")
KEYS = {
    "trainer/step", "trainer/epoch", "trainer/samples", "trainer/attempt", "trainer/world_size", "trainer/resumed",
    "train/loss", "train/epoch_loss", "train/lr", "train/grad_norm", "loss/min", "loss/max",
    "eval/loss", "eval/accuracy",
    "perf/samples_per_second", "perf/step_ms", "perf/max_memory_gib", "skew/slowest_rank", "skew/max_over_median",
}  # fmt: skip


def expected(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows that follow from the metrics log, without speed and skew."""
    lines = list(metrics_log.read(run.metrics_log))
    epochs, evaluations = ({line["step"]: line for line in lines if line["kind"] == kind} for kind in ("epoch", "eval"))
    every = read_json(run.config)["run"]["evaluate_every_steps"]
    length, rows = planned_length(run), []
    grid = read_json(run.config)["tracking"]["log_every_steps"]
    assert length is not None
    for line in lines:
        if line["kind"] != "train" or not (line["step"] % grid == 0 or line["step"] in {**epochs, **evaluations}):
            continue
        if every is not None and line["step"] % every == 0 and line["step"] not in evaluations:
            continue  # stopped before its evaluation
        ends = line["step"] % length.steps_per_epoch == 0 or line["step"] == length.total_steps
        if ends and line["step"] not in epochs:
            continue  # stopped in its evaluation, for which its row waits
        losses = [loss for loss in line["loss_per_rank"] if loss is not None]
        row = {f"trainer/{key}": line[key] for key in ("step", "epoch", "samples", "attempt")}
        row |= {f"loss/rank_{rank}": loss for rank, loss in enumerate(line["loss_per_rank"]) if loss is not None}
        row |= {"train/loss": line["loss"], "train/lr": line["lr"], "trainer/world_size": len(line["loss_per_rank"])}
        row |= {"loss/min": min(losses), "loss/max": max(losses)}
        if line["grad_norm"] is not None:
            row["train/grad_norm"] = line["grad_norm"]
        if line["step"] in evaluations:
            values = {"loss": evaluations[line["step"]]["loss"], **evaluations[line["step"]]["metrics"]}
            row |= {f"eval/{name}": value for name, value in values.items()}
        if line["step"] in epochs:
            row["train/epoch_loss"] = epochs[line["step"]]["train_loss"]
        if rows and rows[-1]["trainer/attempt"] != row["trainer/attempt"]:
            row["trainer/resumed"] = 1
        rows.append(row)
    return rows


def check_rows(given: Iterable[dict[str, Any]], run: RunDir) -> None:
    """Check that each row is there once, in order, with its own values; speed and skew are those of some window."""
    given, wanted = list(given), expected(run)
    grid = read_json(run.config)["tracking"]["log_every_steps"]
    times = [line["time"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]
    assert all(row["_timestamp"] in times for row in given)
    given = [{key: value for key, value in row.items() if not key.startswith("_")} for row in given]
    steps, expected_steps = ([row["trainer/step"] for row in rows] for rows in (given, wanted))
    assert steps == expected_steps, f"missing {sorted({*expected_steps} - {*steps})}, {len(steps)} rows: {steps}"
    windows = [line for line in metrics_log.read(run.metrics_log) if line["kind"] == "window"]
    for row, values in zip(given, wanted, strict=True):
        measured = {key: value for key, value in row.items() if key.split("/")[0] in ("perf", "skew", "time")}
        assert {key: value for key, value in row.items() if key not in measured} == values
        assert {key for key in row if not key.startswith(("loss/rank_", "eval/", "time/"))} <= KEYS
        assert ("train/grad_norm" in row) == (row["trainer/step"] % grid == 0)
        if measured:
            key = "perf/samples_per_second"
            newest = next(line for line in windows if line["samples_per_second"] == measured[key])
            assert newest["first_step"] <= row["trainer/step"] + 1
            assert measured["perf/max_memory_gib"] == newest["max_memory_gib"]
    assert any("perf/step_ms" in row for row in given)


def read_back(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows in the SDK's offline files, in the order of the files' start."""
    rows = []
    for path in sorted(run.wandb.glob("offline-run-*/run-*.wandb")):
        inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(path)]
        printed = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
        records = [json.loads(line) for line in printed.splitlines()]
        rows += [record["history"]["item"] for record in records if record["type"] == "history"]
    return rows


def job(run: RunDir, mode: str, *more: str, steps: int = 150) -> tuple[str, ...]:
    """Return the settings of a run in `run`, tracked as `mode`."""
    place = ("--run.root", str(run.path.parent), "--run.name", run.name, "--run.max-steps", str(steps))
    return (*place, *SETTINGS, "--tracking.wandb", mode, *more)


def two_ranks(run: RunDir, mode: str, *more: str, steps: int = 150) -> tuple[str, ...]:
    return (*JOBS_RUN, "jobs/quickstart.toml", "--nproc-per-node", "2", *job(run, mode, *more, steps=steps))


def one_process(run: RunDir, mode: str, *more: str, steps: int = 150) -> tuple[str, ...]:
    return (*TRAINER, "--config", "jobs/quickstart.toml", *job(run, mode, *more, steps=steps))


def end(words: tuple[str, ...], timeout_s: float = 120, **environment: str) -> Ended:
    with start(*words, **environment) as started:
        return started.end(timeout_s)


def sync(run: RunDir, server: WandbServer, *options: str) -> str:
    """Run `python -m jobs sync RUN`; return what it printed."""
    ended = end(("-m", "jobs", "sync", str(run.path), *options), **server.environment())
    assert ended.code == 0, ended.err
    return ended.out


def wandb_sync(run: RunDir, server: WandbServer) -> None:
    """Run `wandb sync` on each directory of the SDK, as a user of W&B would."""
    for folder in sorted(run.wandb.glob("offline-run-*")):
        words = [sys.executable, "-m", "wandb", "sync", str(folder)]
        environment = os.environ | server.environment()
        subprocess.run(words, cwd=run.path.parent, env=environment, capture_output=True, timeout=60, check=True)


def in_wandb(run: RunDir, server: WandbServer) -> Run:
    """Return the one W&B run of `run`."""
    return server.runs[read_json(run.manifest)["id"]]


def last_step(run: RunDir) -> int:
    return metrics_log.last_steps(run.metrics_log)["train"]


def wait_for_steps(run: RunDir, count: int) -> None:
    """Wait until the metrics log has `count` more steps."""
    begun = last_step(run)
    wait_until(lambda: last_step(run) >= begun + count)


def wait_for_rows(run: RunDir, mode: str, server: WandbServer) -> None:
    """Wait until the server has more rows or, offline, the SDK's files have grown."""

    def size() -> int:
        if mode == "offline":
            return sum(path.stat().st_size for path in run.wandb.glob("offline-run-*/run-*.wandb"))
        return len(in_wandb(run, server).history) if read_json(run.manifest)["id"] in server.runs else 0

    before = size()
    wait_until(lambda: size() > before)


def kill_and_resume(
    run: RunDir, mode: str, seed: int, server: WandbServer, *more: str, kills: int = 5, synced: bool = False
) -> None:
    """Start the run `kills` times and kill all its processes at a random step; then let it end.

    Most are killed after W&B got rows of theirs, some before. With `synced`, `jobs sync` sends what there is after
    every second.
    """
    chance = random.Random(seed)
    for number in range(kills):
        with start(*one_process(run, mode, *more, steps=100_000), **server.environment()) as trainer:
            wait_for_steps(run, 1)
            if number != chance.randrange(5):
                wait_for_rows(run, mode, server)
            wait_for_steps(run, chance.randint(1, 60))
            processes = [*children(trainer.process.pid), trainer.process.pid]
            trainer.process.kill()
            wait_until(partial(all_have_ended, processes))
        if synced and number % 2:
            sync(run, server)
    ended = end(one_process(run, mode, *more, steps=last_step(run) + 20), **server.environment())
    assert ended.code == 0, f"seed {seed}: {ended.err}"


def all_have_ended(processes: list[int]) -> bool:
    return not any(map(is_running, processes))
