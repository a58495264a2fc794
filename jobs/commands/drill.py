"""fnet drill FAULT|all: break a short run on purpose; passes only if the result is identical (trust)"""

import argparse
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
from jobs.verification.faults import FAULTS, Result, strike
from jobs.verification.supervised_run import SupervisedRun, SupervisedRunError, run_undisturbed, supervised

JOBFILE = str(CODE_ROOT / "jobs" / "quickstart.toml")
# Long enough to be struck in the middle, short enough to wait for; what the caller gives stands above it.
SHORT = {
    "--run.max-steps": "600",
    "--checkpoint.every-steps": "40",
    "--parallel.timeout-s": "20",
    "--tracking.wandb": "disabled",
}


def main(argv: Sequence[str]) -> int:
    """Drill the faults that argv names; 0 if all of them passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="fnet drill",
        usage="fnet drill FAULT|all [JOBFILE] [--nproc-per-node N] [--section.key VALUE ...]",
        description="Break a short run on purpose. Passed: final weights, optimizer and ledger are those of a run "
        "that nobody disturbed, to the bit (non-finite: all ranks stop at one step, and the last checkpoint stands).",
    )
    parser.add_argument("fault", metavar="FAULT", choices=[*FAULTS, "all"], help=", ".join([*FAULTS, "all"]))
    parser.add_argument("jobfile", metavar="JOBFILE", nargs="?", default=JOBFILE, help="(%(default)s)")
    parser.add_argument("--nproc-per-node", metavar="N", default=2, type=int, help="ranks, 2 or more (%(default)s)")
    asked, overrides = parser.parse_known_args(argv)
    given = {word.partition("=")[0].replace("_", "-") for word in overrides}
    if asked.nproc_per_node < 2:
        raise ConfigError(f"--nproc-per-node {asked.nproc_per_node}: a drill needs 2 ranks or more")
    short = [word for name, value in SHORT.items() if name not in given for word in (name, value)]
    steps = load_config(["--config", asked.jobfile, *overrides, *short]).run.max_steps or 0
    job = [asked.jobfile, "--nproc-per-node", str(asked.nproc_per_node), *overrides, *short]
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    table = Table("fault", "verdict", "lost steps", "recovered in", "what happened", box=None, pad_edge=False)
    console = Console(highlight=False, width=1000)
    faults = [*FAULTS] if asked.fault == "all" else [asked.fault]
    failed = 0
    console.print(f"undisturbed: {steps:,} steps of {asked.jobfile}, then {', '.join(faults)}", markup=False)
    try:
        undisturbed = run_undisturbed(folder, job)
    except SupervisedRunError as error:
        console.print(f"the undisturbed run failed: {error}", markup=False)
        return 1
    for fault in faults:
        try:
            result = drill(fault, folder, job, undisturbed, steps // 3)
            table.add_row(fault, "passed", *_figures(result), result.seen)
        except SupervisedRunError as error:
            failed += 1
            table.add_row(fault, "FAILED", "–", "–", str(error))
    console.print(table)
    if failed:
        console.print(f"{failed} of {len(faults)} failed; the runs are in {folder}", markup=False)
        return 1
    shutil.rmtree(folder)
    console.print(f"{len(faults)} of {len(faults)} passed: identical to the undisturbed run", markup=False)
    return 0


def drill(fault: str, folder: Path, job: list[str], undisturbed: RunDir, fault_step: int) -> Result:
    """One fault in a run of its own. Raises TrialError if it does not pass."""
    with supervised(SupervisedRun(RunDir(folder / fault), job)) as trial:
        return strike(fault, trial, undisturbed, fault_step)


def _figures(result: Result) -> tuple[str, str]:
    recovered = "–" if result.recovery_s is None else f"{result.recovery_s:.1f} s"
    return "–" if result.lost_steps is None else str(result.lost_steps), recovered
