"""make bench: an epoch of ours beside what a user would pick instead, side by side, in turn.

    python -m tests.benchmarks [ROUNDS]

Every contender runs in processes of its own, one after the other, ROUNDS (3) times, so that a machine that drifts does
not decide. Prints seconds and ratios, checks that all learn alike, and writes bench.json. Needs the real data
(FNET_DATA), and for Lightning and Accelerate the extra `bench`.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

OURS = "fnet_dist"
PEERS = ["Lightning", "Lightning, in memory", "Accelerate", "Accelerate, in memory", "bare loop", OURS]
CONTENDERS = {1: ["book's loop", *PEERS], 2: ["tutorial's DDP", *PEERS]}
BATCH_SIZES = (64, 512)
LOSS_WITHIN = 0.02
# Contender / ours, or for the floor ours / bare: (ranks, batch size, name) -> what is promised.
PROMISED = {
    (1, 64, "book's loop"): 6.0,
    (1, 64, "Lightning"): 6.0,
    (1, 64, "Lightning, in memory"): 2.5,
    (1, 64, "Accelerate"): 5.5,
    (1, 64, "Accelerate, in memory"): 1.7,
    (1, 64, "bare loop"): 1.08,
    (2, 64, "tutorial's DDP"): 2.7,
    (2, 512, "tutorial's DDP"): 4.5,
}
Rounds = list[dict[str, float]]


def main(rounds: int) -> int:
    """Run everything, print the tables, write bench.json; 0 if all contenders learn alike."""
    console = Console(highlight=False, width=120)
    gpus = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{_processor()}, {os.cpu_count()} cores{gpus}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    console.print(f"one epoch, Adam, one thread a rank; {machine}", markup=False)
    results, alike = list[dict[str, Any]](), True
    for ranks, contenders in CONTENDERS.items():
        for batch_size in BATCH_SIZES:
            there = [name for name in contenders if _is_there(name)]
            runs: dict[str, Rounds] = {name: [] for name in there}
            for _ in range(rounds):
                for name in there:
                    runs[name].append(epoch(name, ranks, batch_size))
            table = Table(f"{ranks} rank{'s' * (ranks > 1)}, batch {batch_size}", box=None, pad_edge=False)
            for head in ("median s", "rounds", "loss", "MB, rank 0", "/ fnet_dist", "spread", "promised"):
                table.add_column(head, justify="right")
            for name in there:
                row = _row(name, ranks, batch_size, runs)
                results.append(row)
                table.add_row(*_cells(row))
                alike = alike and row["learns_alike"]
            console.print(table, "")
    Path("bench.json").write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    console.print("all learn alike" if alike else f"losses differ by more than {LOSS_WITHIN}", markup=False)
    return 0 if alike else 1


def epoch(name: str, ranks: int, batch_size: int) -> dict[str, float]:
    """Seconds and loss of one epoch of the contender `name`."""
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    words = [sys.executable, "-m", *launcher, "tests.benchmarks.contenders", name, str(batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_FOLDER": folder, "WANDB_MODE": "offline"}
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    if ended.returncode != 0:
        raise SystemExit(f"{name}: exit code {ended.returncode}\n{ended.stderr[-3000:]}")
    found: dict[str, float] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def _is_there(name: str) -> bool:
    library = name.partition(",")[0].lower()
    return library not in ("lightning", "accelerate") or importlib.util.find_spec(library) is not None


def _row(name: str, ranks: int, batch_size: int, runs: dict[str, Rounds]) -> dict[str, Any]:
    seconds, ours = ([run["seconds"] for run in runs[each]] for each in (name, OURS))
    ratios = sorted(theirs / our for theirs, our in zip(seconds, ours, strict=True))
    loss, our_loss = (statistics.median(run["loss"] for run in runs[each]) for each in (name, OURS))
    promised = PROMISED.get((ranks, batch_size, name))
    ratio = statistics.median(ratios)
    return {
        "ranks": ranks,
        "batch_size": batch_size,
        "contender": name,
        "seconds": seconds,
        "loss": loss,
        "memory_mb": statistics.median(run["memory_mb"] for run in runs[name]),
        "ratio": ratio,
        "ratios": ratios,
        "promised": promised,
        "is_kept": promised is None or (1 / ratio <= promised if name == "bare loop" else ratio >= promised),
        "learns_alike": abs(loss - our_loss) <= LOSS_WITHIN,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    ratio, promised = row["ratio"], row["promised"]
    asked = "" if promised is None else f">= {promised:g}"
    if row["contender"] == "bare loop":
        ratio, asked = 1 / ratio, "" if promised is None else f"<= {promised:g}"
    kept = "" if promised is None else " yes" if row["is_kept"] else " NO"
    shown = f"{ratio:.2f}" + (" (ours / bare)" if row["contender"] == "bare loop" else "")
    return [
        row["contender"],
        f"{statistics.median(row['seconds']):.2f}",
        " ".join(f"{seconds:.2f}" for seconds in row["seconds"]),
        f"{row['loss']:.4f}",
        f"{row['memory_mb']:.0f}",
        shown,
        f"{row['ratios'][0]:.2f}-{row['ratios'][-1]:.2f}",
        asked + kept,
    ]


def _processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
