"""Make run directories like the trainer's, without training: for tests of their readers."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fnet_dist.run import metrics_log, run_dir
from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Made:
    """A run to make: `ranks` is the world size of each attempt, each attempt trains an equal part of the steps."""

    name: str = "quickstart"
    dataset: str = "fashion-mnist"
    ranks: tuple[int, ...] = (2,)
    steps_per_epoch: int = 94
    epochs: int = 3
    steps: int | None = None
    lr: float = 0.003
    classes: tuple[str, ...] = CLASSES
    thumbnail: tuple[int, ...] = (28, 28)
    images: int = 2000
    finished: bool = True
    empty_last_rank: bool = False


CRASH = {"status": "failed", "reason": "crash", "step": 40, "epoch": 1, "metrics": None, "exit_code": 1}
STARTED = Made(name="r", steps=120, finished=False)
NOTHING = Made(name="r", steps=0, finished=False)


def make_run(root: Path, made: Made) -> RunDir:
    """Make a run directory like the trainer's, with a falling loss and noise between ranks."""
    run = RunDir(root / made.name)
    run.path.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"name": made.name, "root": str(root), "seed": 0, "epochs": made.epochs, "max_steps": None},
        "data": {"dataset": made.dataset, "global_batch_size": 64},
        "optim": {"name": "adam", "lr": made.lr},
    }
    manifest = {
        "format": run_dir.FORMAT,
        "versions": {"python": "3.11.2", "torch": "2.11.0", "fnet_dist": "0.1.0"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "dataset": {
            "name": {"fashion-mnist": "Fashion-MNIST", "synthetic": "synthetic data, not Fashion-MNIST"}.get(
                made.dataset, made.dataset
            ),
            "stand_in": made.dataset == "synthetic",
            "sha256": "ab" * 32,
            "train_count": 60_000,
            "test_count": 10_000,
            "class_names": list(made.classes),
        },
        "device": "cpu",
        "world_size": made.ranks[0],
        "resumed_from": None,
        "metrics": {"accuracy": "higher"},
        "monitor": "accuracy",
    }
    run_dir.write_json(run.config, config)
    run_dir.write_json(run.manifest, manifest)
    metrics_log.append(run.metrics_log, make_lines(made))
    if made.finished:
        make_end(run, made)
    return run


def make_lines(made: Made) -> list[Any]:
    """Return the metrics log of `made`: a train line a step, a window every 40 steps, two lines an epoch."""
    random = np.random.default_rng(made.lr.as_integer_ratio()[0] % 1000)
    total = made.steps_per_epoch * made.epochs if made.steps is None else made.steps
    lines: list[Any] = []
    since: list[float] = []
    for step in range(1, total + 1):
        attempt = min(len(made.ranks), 1 + (step - 1) * len(made.ranks) // total)
        ranks = made.ranks[attempt - 1]
        level = 0.24 + 0.3 / (1 + step / 300) + 1.8 * np.exp(-step / 12) + 20 * abs(made.lr - 0.003)
        per_rank: list[float | None] = np.abs(level + random.normal(0, 0.09 * level**0.5, ranks)).tolist()
        loss = float(np.mean(np.array(per_rank, dtype=float)))
        if made.empty_last_rank:
            per_rank[-1] = None
        epoch = 1 + (step - 1) // made.steps_per_epoch
        since.append(loss)
        both = {"epoch": epoch, "step": step, "attempt": attempt}
        time = 1_790_000_000 + step / 700
        lines.append(
            {"kind": "train", **both, "samples": 64 * step, "loss": loss, "loss_per_rank": per_rank, "lr": made.lr}
            | {"grad_norm": None, "time": time}
        )
        if step % 40 == 0 or step == total:
            speed = ranks**0.8 * 26_000 * float(random.normal(1, 0.03)) * (0.6 if step == 40 else 1)
            lines.append(
                {"kind": "window", "first_step": 1 + (step - 1) // 40 * 40, "last_step": step, "time": time}
                | {"samples_per_second": speed, "step_ms": 64_000 / speed, "slowest_rank": None, "attempt": attempt}
                | {"max_over_median": None, "max_memory_gib": 0.4, "world_size": ranks}
            )
        if step % made.steps_per_epoch == 0:
            correct = int(10_000 * (0.89 - 0.1 / epoch - 5 * abs(made.lr - 0.003)))
            evaluation = {"loss": 0.35 + 0.1 / epoch, "metrics": {"accuracy": correct / 10_000}}
            lines.append({"kind": "eval", **both, **evaluation, "count": 10_000, "seconds": 0.1})
            training = {"train_loss": float(np.mean(since)), "seconds": 1.2, "samples_per_second": 50_000.0}
            lines.append({"kind": "epoch", **both, **training})
            since = []
    return lines


def make_end(run: RunDir, made: Made) -> None:
    """Write predictions.safetensors and outcome.json."""
    random = np.random.default_rng(1)
    true = random.integers(0, len(made.classes), made.images)
    wrong = random.random(made.images) < 0.13
    predicted = np.where(wrong, random.integers(0, len(made.classes), made.images), true)
    index = np.arange(min(40, made.images))
    shades = random.integers(0, 256, (len(index), *made.thumbnail))
    tensors = {"true": true.astype(np.uint8 if len(made.classes) < 256 else np.int64), "predicted": predicted}
    save_file(tensors | {"thumbnails": shades.astype(np.uint8), "thumbnail_index": index}, run.predictions)
    end = {"status": "finished", "reason": "finished", "step": made.steps_per_epoch * made.epochs}
    rest = {"epoch": made.epochs, "metrics": {"loss": 0.3833, "accuracy": 0.8566}, "exit_code": 0, "launch_id": None}
    run_dir.write_json(run.outcome, end | rest)


def train_line(step: int, attempt: int, loss: float = 1.0, epoch: int = 1) -> Any:
    """Return a train line of two ranks."""
    line = {"kind": "train", "step": step, "epoch": epoch, "samples": 64 * step, "loss": loss, "lr": 0.003}
    return line | {"loss_per_rank": [loss, loss], "grad_norm": None, "time": 1.0, "attempt": attempt}


def claimed(root: Path, made: Made = STARTED) -> tuple[RunDir, Attempt]:
    """Make a run whose attempt 1 this process owns: it counts as running until its heartbeat is 30 s old."""
    attempt = claim_attempt(RunDir(root / made.name), world_size=2)  # first: a log of attempt 1 makes the next one 2
    return make_run(root, made), attempt


def change_owner(attempt: Attempt, **values: Any) -> None:
    """Change values in begin.json."""
    write_json(attempt.begin, read_json(attempt.begin) | values)


def age(path: Path, seconds: float) -> None:
    """Set the modification time of `path` to `seconds` ago."""
    os.utime(path, times=(time.time() - seconds, time.time() - seconds))
