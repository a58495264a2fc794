"""How soon jobs/speedrun.toml reaches 88 % on two ranks: `python -m tests.benchmarks.speedrun [SEEDS]`; the real data.

From the first step, beside the ten epochs of the book's loop (87.4 %) in the same run, and from the start of the
processes, imports included. An evaluation takes what lies between an epoch's last step and the next one's first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fnet_dist import ledger
from fnet_dist.run_dir import RunDir

GOAL = 0.88
BOOK_EPOCHS = 10
OF_THE_BOOK = 25  # so many times as fast is promised
ROOT = os.environ.get("FNET_DATA", str(Path("~/.pytorch/F_MNIST_data").expanduser()))


def book_s() -> float:
    """Seconds of the book's ten epochs."""
    code = f"from tests.benchmarks.contenders import book; print(book(64, {BOOK_EPOCHS})[0])"
    words = [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {code}"]
    return float(subprocess.run(words, check=True, capture_output=True, text=True, timeout=600).stdout)


def run_of_seed(seed: int, folder: Path) -> tuple[float, float, float]:
    """Seconds from the first step, and from the processes' start, to the first evaluation at GOAL; its accuracy."""
    argv = ["jobs", "run", "jobs/speedrun.toml", "--nproc-per-node", "2", "--run.root", str(folder)]
    argv += ["--run.name", f"seed-{seed}", "--run.seed", str(seed), "--data.root", ROOT]
    began = time.time()
    subprocess.run([sys.executable, "-m", *argv], check=True, capture_output=True, text=True, timeout=300)
    lines = list(ledger.read(RunDir(folder / f"seed-{seed}").ledger))
    train = {line["step"]: line["time"] for line in lines if line["kind"] == "train"}
    epochs: list[dict[str, Any]] = [line for line in lines if line["kind"] == "epoch"]
    first = min(train.values()) - next(line["step_ms"] for line in lines if line["kind"] == "window") / 1000
    evaluation = statistics.median(train[line["step"] + 1] - train[line["step"]] for line in epochs[:-1])
    there = next((line for line in epochs if line["test_accuracy"] >= GOAL), None)
    if there is None:
        raise SystemExit(f"seed {seed}: {epochs[-1]['test_accuracy']:.4f} after the last epoch, expected {GOAL}")
    reached = train[there["step"]] + evaluation
    return reached - first, reached - began, there["test_accuracy"]


def main(seeds: int) -> int:
    """Run the seeds, the book in their middle; 0 if all of them get there in time."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            if seed == seeds // 2:
                book = book_s()
            found.append(run_of_seed(seed, Path(folder)))
            print("seed {}: {:.2f} s from the first step, {:.1f} s from the start, {:.4f}".format(seed, *found[-1]))
    steps_s, starts_s, accuracies = zip(*found, strict=True)
    ratio = book / statistics.median(steps_s)
    print(
        f"{GOAL:.0%} in {statistics.median(steps_s):.2f} s from the first step ({statistics.median(starts_s):.1f} from "
        f"the start), median of {seeds}; lowest accuracy {min(accuracies):.4f}; the book's {BOOK_EPOCHS} epochs "
        f"{book:.1f} s, {ratio:.1f} times as long (promised: {OF_THE_BOOK})"
    )
    print(json.dumps({"seconds": steps_s, "from_start": starts_s, "accuracy": accuracies, "book": book}))
    return 0 if ratio >= OF_THE_BOOK else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
