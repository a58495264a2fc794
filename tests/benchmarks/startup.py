"""From the start of a process to its first step: `python -m tests.benchmarks.startup [ROUNDS]`; needs the real data.

In turn, with everything in the file cache: a process that imports torch and torchvision and decodes the training data;
ours, with everything on (tracking offline), to the end of its first step; and ours again, which says where it has got
to. Then ours at two ranks, by how much processor each of them takes until then.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir

AT_MOST = 1.3
ROOT = os.environ.get("FNET_DATA", str(Path("~/.pytorch/F_MNIST_data").expanduser()))
NEEDED = f"""
import sys, time, torch, torchvision
torchvision.datasets.FashionMNIST({ROOT!r}, train=True)
print(time.time(), file=sys.stderr)
"""
MARKED = """
import json, sys, time
marks = [("interpreter", time.time())]
def mark(name): marks.append((name, time.time()))
import fnet_dist.train; mark("settings")
import torch; mark("torch")
import fnet_dist.training.trainer; mark("our modules")
from fnet_dist.training import epochs, trainer
def marked(module, name, word):
    function = getattr(module, name)
    def call(*arguments, **named):
        result = function(*arguments, **named)
        mark(word)
        return result
    setattr(module, name, call)
marked(trainer, "build_data", "data: verify, decode")
marked(trainer, "claim_run", "claim the run")
marked(trainer, "build_parts", "model and optimizer")
marked(trainer, "check_parts", "one test batch")
marked(epochs, "agree_to_stop", "record")
code = fnet_dist.train.main(sys.argv[1:])
print(json.dumps(marks), file=sys.stderr)
"""


@contextmanager
def a_run(*extra: str) -> Iterator[tuple[RunDir, list[str]]]:
    """A run directory to be, and the words of a run of one step in it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", "jobs/baseline.toml", "--run.root", folder, "--run.name", "r", "--run.max-steps", "1"]
        yield RunDir(Path(folder) / "r"), [*words, "--data.root", ROOT, "--tracking.wandb", "offline", *extra]


def first_step(run: RunDir) -> float:
    """When it was done, in Unix time."""
    return next(float(line["time"]) for line in metrics_log.read(run.metrics_log) if line["kind"] == "train")


def quietly(*words: str) -> str:
    """Run `python WORDS`; what it says on standard error."""
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True, timeout=300).stderr


def needed_s() -> float:
    """The process that only imports and decodes, until it has."""
    began = time.time()
    return float(quietly("-c", NEEDED)) - began


def ours_s(*launcher: str) -> float:
    """Ours, until the first step is done."""
    with a_run() as (run, words):
        began = time.time()
        quietly(*launcher, "-m", "fnet_dist.train", *words)
        return first_step(run) - began


def parts_s() -> dict[str, float]:
    """Seconds of each part of ours."""
    with a_run() as (run, words):
        began = time.time()
        marks: list[tuple[str, float]] = json.loads(quietly("-c", MARKED, *words).strip().splitlines()[-1])
        marks.append(("first step", first_step(run)))
        return {name: at - before for (name, at), (_, before) in zip(marks, [("", began), *marks[:-1]], strict=True)}


def main(rounds: int) -> int:
    """Print medians and the ratio; 0 if it is kept."""
    needed, ours, parts = list[float](), list[float](), list[dict[str, float]]()
    for number in range(rounds + 1):
        found = needed_s(), ours_s(), parts_s()
        if number > 0:  # the first fills the file cache
            needed.append(found[0])
            ours.append(found[1])
            parts.append(found[2])
    ratio = statistics.median(our / need for our, need in zip(ours, needed, strict=True))
    print(
        f"first step after {statistics.median(ours):.2f} s; to import torch and torchvision and decode the data takes "
        f"{statistics.median(needed):.2f} s: {ratio:.2f} times as long (at most {AT_MOST})"
    )
    medians = {name: statistics.median(each[name] for each in parts) for name in parts[0]}
    print("made of, s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in medians.items()))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable)
    print(f"two ranks by torchrun: {statistics.median(ours_s(*launcher) for _ in range(rounds)):.2f} s")
    print(json.dumps({"needed_s": needed, "ours_s": ours, "parts_s": medians}))
    return 0 if ratio <= AT_MOST else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
