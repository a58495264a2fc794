"""fnet verify [RUN]: check the hashes of every checkpoint; --replay A:B trains those steps again (trust 2)"""

from collections.abc import Sequence

from fnet_dist.checkpoint.storage import checkpoint_steps, find_corruption
from fnet_dist.errors import CheckpointError, ConfigError
from fnet_dist.run.run_dir import read_manifest
from jobs.runs import command_parser, find_run_or_job
from jobs.verification.replay import replay


def main(argv: Sequence[str]) -> int:
    """Print a line for each checkpoint and the step from which a start would resume; or replay steps.

    Raises CheckpointError if a checkpoint is damaged, FnetError if a replay differs.
    """
    parser = command_parser(__doc__)
    parser.add_argument("--replay", nargs="?", const="", metavar="A:B", help="train these steps again; all if left out")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks of the replay (those of the run)")
    args = parser.parse_args(argv)
    if args.nproc_per_node is not None and args.replay is None:
        raise ConfigError(f"--nproc-per-node {args.nproc_per_node} is for --replay, which is not given")
    run = find_run_or_job(args.run)
    if args.replay is not None:
        print(replay(run, args.replay, args.nproc_per_node))
        return 0
    steps = checkpoint_steps(run)  # newest first
    if not steps:
        print(f"{run.name} has no checkpoints yet")
        return 0
    run_id, good = read_manifest(run)["id"], []
    for step in steps:
        damage = find_corruption(run.checkpoint(step), run_id)
        print(f"step {step:>9,}  " + ("good" if damage is None else f"DAMAGED: {damage}"))
        good += [step] if damage is None else []
    resumes = f"a start goes on from step {good[0]:,}" if good else "a start has nothing to go on from"
    summary = f"{run.name}: {len(good)} of {len(steps)} checkpoints are good; {resumes}"
    if len(good) < len(steps):
        raise CheckpointError(summary)  # exit code 65
    print(summary)
    return 0
