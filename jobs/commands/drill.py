"""fnet drill FAULT|all: break a short run on purpose; passes only if the result is identical (trust 3)

Passed: final weights, optimizer and metrics log are bit-identical to those of an undisturbed run (non-finite: all ranks
stop at one step, and the last checkpoint is intact).
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fnet_dist.config.load import load_config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.run_dir import RunDir
from jobs.runs import command_parser, with_defaults
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.faults import FAULTS, Result
from jobs.verification.supervised_run import (
    SupervisedRun,
    SupervisedRunError,
    check_overrides,
    run_undisturbed,
    supervised,
)

JOBFILE = str(CODE_ROOT / "jobs" / "quickstart.toml")
# Long enough for a fault in the middle, short enough to wait for. Overrides of the caller come first.
DEFAULTS = {
    "--run.max-steps": "600",
    "--checkpoint.every-steps": "40",  # so that few steps are lost
    "--parallel.timeout-s": "20",  # `hang` waits that long
    "--tracking.wandb": "disabled",  # a broken run belongs to no project
}


def main(argv: Sequence[str]) -> int:
    """Run the drills that argv names. Return 0 if all passed, else 1."""
    parser = command_parser(
        __doc__, usage="fnet drill FAULT|all [JOBFILE] [--nproc-per-node N] [--section.key VALUE ...]"
    )
    parser.add_argument("fault", metavar="FAULT", choices=[*FAULTS, "all"], help=", ".join([*FAULTS, "all"]))
    parser.add_argument("jobfile", metavar="JOBFILE", nargs="?", default=JOBFILE, help="(%(default)s)")
    parser.add_argument("--nproc-per-node", metavar="N", default=2, type=int, help="ranks, 2 or more (%(default)s)")
    args, overrides = parser.parse_known_args(argv)
    if args.nproc_per_node < 2:
        raise ConfigError(f"--nproc-per-node {args.nproc_per_node}: a drill needs 2 ranks or more")
    check_overrides(overrides)
    overrides = with_defaults(overrides, DEFAULTS)
    steps = load_config(["--config", args.jobfile, *overrides]).run.max_steps or 0
    job = [args.jobfile, "--nproc-per-node", str(args.nproc_per_node), *overrides]
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    table = Table("fault", "verdict", "lost steps", "recovered in", "what happened", box=None, pad_edge=False)
    console = Console(highlight=False, width=1000)  # rows are not wrapped: they are searched with grep
    faults, failed = [*FAULTS] if args.fault == "all" else [args.fault], 0
    console.print(f"undisturbed: {steps:,} steps of {args.jobfile}, then {', '.join(faults)}", markup=False)
    try:
        undisturbed = run_undisturbed(folder, job)
    except SupervisedRunError as error:
        console.print(f"the undisturbed run failed: {error}", markup=False)
        return 1
    for fault in faults:
        try:
            result = drill(fault, folder, job, undisturbed, steps // 3)
        except SupervisedRunError as error:
            failed += 1
            table.add_row(fault, "FAILED", "–", "–", str(error))
        else:
            lost = "–" if result.lost_steps is None else str(result.lost_steps)
            recovery = "–" if result.recovery_s is None else f"{result.recovery_s:.1f} s"
            table.add_row(fault, "passed", lost, recovery, result.seen)
    console.print(table)
    if failed:
        console.print(f"{failed} of {len(faults)} failed; the runs are in {folder}", markup=False)
        return 1
    shutil.rmtree(folder)  # kept after a failure, to look at
    console.print(f"{len(faults)} of {len(faults)} passed: identical to the undisturbed run", markup=False)
    return 0


def drill(fault: str, folder: Path, job: list[str], undisturbed: RunDir, fault_step: int) -> Result:
    """Inject one fault after `fault_step`. Raises SupervisedRunError unless the result is that of `undisturbed`."""
    with supervised(SupervisedRun(RunDir(folder / fault), job)) as run:
        result = FAULTS[fault](run, fault_step)
        if wrong := [*run_differences(undisturbed, run.run), *gaps(run.run)]:
            raise SupervisedRunError(wrong[0])
        return result
