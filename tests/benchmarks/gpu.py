"""Check and time training on a GPU: `make gpu`, or python -m tests.benchmarks.gpu [DEVICE]; needs the real data.

First whether it is right, on one GPU and on all of them: training as a CPU trains, compiled as eager, each test image
counted once, the same bits after a kill. Then how fast: microseconds a step, jobs/baseline.toml beside the book's loop,
jobs/speedrun.toml to 88 %. Writes gpu.json. With DEVICE cpu, two ranks standing for all, it tries out itself.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fnet_dist.distributed.device import set_arithmetic
from fnet_dist.distributed.process_group import Group
from fnet_dist.recipes.fashion_mnist.dataset import build_dataset
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir
from jobs.verification.compare_runs import run_differences
from jobs.verification.supervised_run import SupervisedRun, supervised
from tests.benchmarks.contenders import ROOT, book
from tests.benchmarks.speedrun import GOAL, run_of_seed
from tests.benchmarks.steps import steps_of
from tests.helpers.config import FashionConfig

BATCH_SIZES = (64, 512, 4096)
EPOCHS = 10
EVERYTHING = ["--model.dropout", "0.25", "--optim.max-grad-norm", "1", "--parallel.grad-accum-steps", "2"]
Losses = list[float]


def run_of(folder: Path, name: str, jobfile: str, ranks: int, *extra: str) -> RunDir:
    """A run under `jobs run`, to its end."""
    with supervised(SupervisedRun(RunDir(folder / name), words_of(jobfile, ranks, *extra))) as supervised_run:
        supervised_run.end(supervised_run.start(), 0)
        return supervised_run.run


def words_of(jobfile: str, ranks: int, *extra: str) -> list[str]:
    """Return the arguments after `jobs run`."""
    return [jobfile, "--nproc-per-node", str(ranks), "--data.root", ROOT, "--tracking.wandb", "disabled", *extra]


def losses(run: RunDir) -> Losses:
    """Of every step."""
    return [line["loss"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]


def furthest(some: Losses, others: Losses) -> float:
    """The largest relative difference."""
    return max(abs(one / other - 1) for one, other in zip(some, others, strict=True))


def checks(folder: Path, device: str, ranks: int) -> Iterator[tuple[str, bool, str]]:
    """(what, whether it holds, what was seen) on so many ranks."""
    short = ["--run.max-steps", "40", "--data.global-batch-size", "512", "--parallel.device"]
    of_cpu = run_of(folder, f"of-cpu-{ranks}", "jobs/baseline.toml", 1, *short, "cpu")
    here = run_of(folder, f"here-{ranks}", "jobs/baseline.toml", ranks, *short, device)
    far = furthest(losses(here), losses(of_cpu))
    yield "trains as one CPU does, 40 steps", far < 1e-3, f"losses within {far:.1e}"
    eager, compiled = (
        run_of(folder, f"compile-{flag}-{ranks}", "jobs/baseline.toml", ranks, *short, device, *EVERYTHING, *words)
        for flag, words in (("off", []), ("on", ["--parallel.compile", "true"]))
    )
    far = furthest(losses(compiled), losses(eager))
    yield "compiled as eager: dropout, clipping, accumulation", far < 1e-3, f"losses within {far:.1e}"
    mine, theirs = (next(e for e in metrics_log.read(run.metrics_log) if e["kind"] == "eval") for run in (here, of_cpu))
    accuracy, on_cpu = (each["metrics"]["accuracy"] for each in (mine, theirs))
    counted = mine["count"] == 10_000 and abs(accuracy - on_cpu) <= 0.001
    yield "evaluates each image once", counted, f"accuracy {accuracy:.4f}, on the CPU {on_cpu:.4f}"
    yield "goes on to the bit after kill -9", *killed(folder, device, ranks)


def killed(folder: Path, device: str, ranks: int) -> tuple[bool, str]:
    """Compare a killed run with an undisturbed one; return where it resumed and what differs."""
    words = ["--run.max-steps", "2000", "--checkpoint.every-steps", "100", "--model.dropout", "0.25"]
    words += ["--parallel.device", device]
    undisturbed = run_of(folder, f"undisturbed-{ranks}", "jobs/baseline.toml", ranks, *words)
    faulty = SupervisedRun(RunDir(folder / f"killed-{ranks}"), words_of("jobs/baseline.toml", ranks, *words))
    with supervised(faulty):
        faulty.start_until(300)
    with supervised(faulty) as supervised_run:
        supervised_run.end(supervised_run.start(), 0)
        different = run_differences(undisturbed, supervised_run.run)
        return not different, different[0] if different else f"went on from step {supervised_run.resumed_step():,}"


def step_us(device: torch.device) -> Iterator[tuple[int, bool, float]]:
    """(batch size, compiled, microseconds a step), world size 1."""
    group = Group(0, 1, device)
    config = FashionConfig.model_validate({"data": {"root": ROOT}})
    data = build_dataset(config.data, "train", device)
    for batch_size in BATCH_SIZES:
        for compiled in (False, True):
            take = steps_of(group, data, batch_size, compile=compiled)
            count = 60_000 // max(batch_size, 512)
            take(count)
            us = []
            for _ in range(5):
                began = time.perf_counter()
                take(count)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                us.append(1e6 * (time.perf_counter() - began) / count)
            yield batch_size, compiled, statistics.median(us)


def training_s(run: RunDir) -> float:
    """All epochs' training, without evaluations."""
    return sum(line["seconds"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "epoch")


def main(device: str) -> int:
    """Print and write everything; 0 if it is right."""
    console = Console(highlight=False, width=120)
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            f"no GPU that torch can use; to try it out: {sys.executable} -m tests.benchmarks.gpu cpu (5 minutes)",
            markup=False,
        )
        return 2
    gpus = torch.cuda.device_count()
    name = f"{gpus} x {torch.cuda.get_device_name()}" if device == "cuda" else "CPU"
    machine = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    results: dict[str, Any] = {"machine": machine, "checks": [], "step_us": []}
    console.print(machine, markup=False)
    set_arithmetic(FashionConfig(), torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        everything = gpus if device == "cuda" else 2
        for ranks in sorted({1, everything}):
            for what, holds, seen in checks(Path(folder), device, ranks):
                results["checks"].append({"ranks": ranks, "what": what, "holds": holds, "seen": seen})
                console.print(f"{'OK  ' if holds else 'MISS'} {ranks} x {device}: {what}: {seen}", markup=False)
        table = Table("us a step", *(f"batch {size:,}" for size in BATCH_SIZES), box=None, pad_edge=False)
        for batch_size, compiled, us in step_us(torch.device(device)):
            results["step_us"].append({"batch_size": batch_size, "compiled": compiled, "us": us})
        for compiled, word in ((False, "eager"), (True, "compiled")):
            table.add_row(word, *(f"{row['us']:.0f}" for row in results["step_us"] if row["compiled"] == compiled))
        console.print(table)
        ten = {"book": book(64, EPOCHS)[0]}
        for word, flag in (("eager", "false"), ("compiled", "true")):
            words = ["--parallel.device", device, "--parallel.compile", flag]
            ten[word] = training_s(run_of(Path(folder), word, "jobs/baseline.toml", 1, *words))
        console.print(
            f"{EPOCHS} epochs of training, batch 64: the book's loop {ten['book']:.1f} s, ours {ten['eager']:.2f} s "
            f"({ten['book'] / ten['eager']:.0f} times as fast), compiled {ten['compiled']:.2f} s"
        )
        reached = run_of_seed(0, Path(folder), everything)[GOAL]
        console.print(
            f"{GOAL:.0%} after {reached.seconds:.2f} s from the first step, {reached.from_start:.1f} s from the start"
        )
    results |= {"ten_epochs_s": ten, "to_88_s": reached.seconds, "to_88_from_start_s": reached.from_start}
    Path("gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(check["holds"] for check in results["checks"]) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
