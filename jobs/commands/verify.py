"""fnet verify [RUN]: check the hashes of every checkpoint; --replay A:B trains those steps again (trust)"""

import argparse
from collections.abc import Sequence

from fnet_dist.checkpoint.storage import checkpoint_steps, find_corruption
from fnet_dist.errors import CheckpointError, ConfigError
from fnet_dist.run.run_dir import read_json
from jobs.runs import find_run_or_job
from jobs.verification.replay import replay


def main(argv: Sequence[str]) -> int:
    """One line a checkpoint, and what a start would go on from; or whether a replay is equal.

    Raises CheckpointError if a checkpoint is damaged, FnetError if a replay differs.
    """
    parser = argparse.ArgumentParser(
        prog="fnet verify",
        usage="fnet verify [RUN] [--replay [A:B] [--nproc-per-node N]]",
        description="Check the hashes of all checkpoints; or train steps again and compare them to the bit.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory; the newest if left out")
    parser.add_argument("--replay", nargs="?", const="", metavar="A:B", help="train these steps again; all if left out")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="ranks of the replay; those of the run if left out"
    )
    asked = parser.parse_args(argv)
    if asked.nproc_per_node is not None and asked.replay is None:
        raise ConfigError(f"--nproc-per-node {asked.nproc_per_node} is for --replay, which is not given")
    run = find_run_or_job(asked.run)
    if asked.replay is not None:
        print(replay(run, asked.replay, asked.nproc_per_node))
        return 0
    if not checkpoint_steps(run):
        print(f"{run.name} has no checkpoints yet")
        return 0
    steps, run_id = checkpoint_steps(run), read_json(run.manifest)["id"]
    found = {step: find_corruption(run.checkpoint(step), run_id) for step in steps}
    for step, wrong in found.items():
        print(f"step {step:>9,}  " + ("good" if wrong is None else f"DAMAGED: {wrong}"))
    good = [step for step in steps if found[step] is None]
    goes_on = f"a start goes on from step {good[0]:,}" if good else "a start has nothing to go on from"
    summary = f"{run.name}: {len(good)} of {len(steps)} checkpoints are good; {goes_on}"
    if len(good) < len(steps):
        raise CheckpointError(summary)
    print(summary)
    return 0
