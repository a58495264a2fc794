"""python -m jobs verify RUN: every byte of every checkpoint against its hash. No torch."""

import argparse
from collections.abc import Sequence

from fnet_dist.checkpoint_dir import checkpoint_steps, damage
from fnet_dist.errors import CheckpointError
from fnet_dist.run_dir import read_json
from jobs.runs import find


def main(argv: Sequence[str]) -> int:
    """One line a checkpoint, and what a start would go on from. Raises CheckpointError if one is damaged."""
    parser = argparse.ArgumentParser(prog="python -m jobs verify", description="Check the hashes of all checkpoints.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory; the newest if left out")
    run = find(parser.parse_args(argv).run)
    if not checkpoint_steps(run):
        print(f"{run.name} has no checkpoints yet")
        return 0
    steps, run_id = checkpoint_steps(run), read_json(run.manifest)["id"]
    found = {step: damage(run.checkpoint(step), run_id) for step in steps}
    for step, wrong in found.items():
        print(f"step {step:>9,}  " + ("good" if wrong is None else f"DAMAGED: {wrong}"))
    good = [step for step in steps if found[step] is None]
    goes_on = f"a start goes on from step {good[0]:,}" if good else "a start has nothing to go on from"
    summary = f"{run.name}: {len(good)} of {len(steps)} checkpoints are good; {goes_on}"
    if len(good) < len(steps):
        raise CheckpointError(summary)
    print(summary)
    return 0
