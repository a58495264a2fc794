"""Check and time training on a GPU: `make gpu`, or python -m tests.benchmarks.gpu [DEVICE]; needs the real data.

First whether it is right, on one GPU and on all of them: training as a CPU trains, compiled as eager, each test image
counted once, the same bits after a kill and at any number of ranks, a failure and a hang named. Then how fast:
microseconds a step, by itself and with everything on, beside a bare loop and a whole-step CUDA graph;
jobs/baseline.toml beside the book's loop, jobs/speedrun.toml to 88 %. Writes gpu.json. With DEVICE cpu, two ranks
standing for all, it tries out itself.
"""

import json
import os
import signal
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
from jobs.__main__ import main as fnet
from jobs.verification.compare_runs import run_differences
from jobs.verification.supervised_run import SupervisedRun, ranks_of, supervised, text_of
from tests.benchmarks.bare_step import as_graph, bare_step
from tests.benchmarks.bare_step import step_us as bare_step_us
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
    yield "names a failure", *failed(folder, device, ranks)
    yield "is profiled while it trains", *profiled(folder, device, ranks)
    if ranks > 1:
        yield "has the same bits at any number of ranks, invariant", *invariant(folder, device, ranks)
        yield "names the rank that hangs", *hung(folder, device, ranks)


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


def failed(folder: Path, device: str, ranks: int) -> tuple[bool, str]:
    """Train with a learning rate that is far too large; return what is said of it."""
    words = ["--parallel.device", device, "--optim.lr", "1e30", "--run.max-steps", "40"]
    faulty = SupervisedRun(RunDir(folder / f"failed-{ranks}"), words_of("jobs/baseline.toml", ranks, *words))
    with supervised(faulty):
        faulty.end(faulty.start(), 1)
    [said, *_] = [line for line in text_of(faulty.output).splitlines() if line.startswith("error: ")] or [""]
    return " at step 2 on rank 0" in said, said


def profiled(folder: Path, device: str, ranks: int) -> tuple[bool, str]:
    """Ask a run for a profile, on a GPU with the GPU's own times; return its longest operation."""
    words = ["--parallel.device", device, "--run.epochs", "100000", "--model.dropout", "0.25"]
    asked = SupervisedRun(RunDir(folder / f"profiled-{ranks}"), words_of("jobs/baseline.toml", ranks, *words))
    with supervised(asked):
        asked.start_until(300)
        held = fnet(["ask", str(asked.run.path), "profile"]) == 0
    tables = [*asked.run.attempt(1).glob("profile-*/rank_0.operations.txt")]
    lines = tables[0].read_text().splitlines() if tables else [""] * 4
    return held and ("Self CUDA" in lines[1]) == (device == "cuda"), f"longest: {lines[3][:60].strip()}"


def invariant(folder: Path, device: str, most: int) -> tuple[bool, str]:
    """Train on 1, 2, 4, ... ranks with `parallel.numerics invariant`, in eager mode and compiled; compare weights."""
    words = ["--parallel.numerics", "invariant", "--run.max-steps", "40", "--data.global-batch-size", "512"]
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    different = []
    for flag in ("false", "true"):
        both = [*words, "--parallel.device", device, "--parallel.compile", flag]
        runs = [run_of(folder, f"invariant-{flag}-{count}", "jobs/baseline.toml", count, *both) for count in counts]
        first = runs[0].model.read_bytes()
        different += [f"{run.name} differs" for run in runs[1:] if run.model.read_bytes() != first]
    return not different, ", ".join(different) or f"{', '.join(map(str, counts))} ranks, eager and compiled"


def hung(folder: Path, device: str, ranks: int) -> tuple[bool, str]:
    """Suspend the last rank; return which one is named."""
    words = ["--parallel.device", device, "--parallel.timeout-s", "5", "--parallel.max-restarts", "0"]
    faulty = SupervisedRun(RunDir(folder / f"hung-{ranks}"), words_of("jobs/baseline.toml", ranks, *words))
    with supervised(faulty):
        launcher = faulty.start_until(300)
        os.kill(ranks_of(launcher.pid)[ranks - 1], signal.SIGSTOP)
        faulty.end(launcher, 1)
    [said, *_] = [line for line in text_of(faulty.output).splitlines() if line.startswith("error: attempt")] or [""]
    return f": rank {ranks - 1} shows no life" in said, said


def whole_us(folder: Path, device: str) -> Iterator[tuple[int, float]]:
    """(batch size, microseconds a step) of a run of one rank with window, log and checkpoints, after its start."""
    for batch_size in BATCH_SIZES:
        words = ["--data.global-batch-size", str(batch_size), "--run.epochs", "3", "--parallel.device", device]
        run = run_of(folder, f"whole-{batch_size}", "jobs/baseline.toml", 1, *words)
        windows = [line["step_ms"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "window"]
        yield batch_size, 1e3 * statistics.median(windows[len(windows) // 3 :])


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


def bare_us(device: str) -> dict[str, dict[int, float]]:
    """{name: {batch size: microseconds a step}} of a bare loop and of a whole step as one CUDA graph."""
    data = build_dataset(FashionConfig.model_validate({"data": {"root": ROOT}}).data, "train", torch.device(device))
    inputs, targets = data.batch(torch.arange(len(data)), 0)
    steps = {size: bare_step(inputs, targets, size) for size in BATCH_SIZES}
    bare = {size: bare_step_us(step) for size, step in steps.items()}
    if device != "cuda":
        return {"a bare loop": bare}
    return {"a bare loop": bare, "one CUDA graph": {size: bare_step_us(as_graph(step)) for size, step in steps.items()}}


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
        results["others_us"] = {"eager, in a run": dict(whole_us(Path(folder), device)), **bare_us(device)}
        for word, of_sizes in results["others_us"].items():
            table.add_row(word, *(f"{us:.0f}" for us in of_sizes.values()))
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
