"""fnet rehearse JOBFILE: run the job on a private Slurm, preempted and timed out; then compare (trust 4)

An undisturbed run is what it is compared with. Default: 1,000 steps on the CPU.
"""

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.run.metrics_log import last_steps
from fnet_dist.run.run_dir import RunDir
from jobs.runs import command_parser, load_job, with_defaults
from jobs.submission.flags import add_flags, options_of, overrides_of
from jobs.submission.sbatch import build_executor
from jobs.submission.submit import plan_job, submit_runs
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import SupervisedRunError, check_overrides, run_undisturbed
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun, preempt
from slurm import client
from slurm.errors import SlurmError
from slurm.sandbox.cluster import check_size, local_cluster, missing_programs
from slurm.sandbox.processes import processes
from slurm.sbatch_options import NAMES, Options
from slurm.site_config import Site, read_site
from slurm.submit_env import changed

# Long enough for two interruptions, short enough to wait for. Overrides of the caller come first.
DEFAULTS = {
    "--run.max-steps": "1000",
    "--checkpoint.every-steps": "100",
    "--parallel.device": "cpu",  # the private Slurm has no real GPUs
    "--tracking.wandb": "disabled",
}


def main(argv: Sequence[str]) -> int:
    """Rehearse the job and print each part. Return 0 if all passed, else 1. Raises ConfigError if Slurm is missing."""
    parser = command_parser(__doc__)
    add_flags(parser)
    args, overrides = parser.parse_known_args(argv)
    check_overrides(overrides)
    if missing := missing_programs():
        raise ConfigError(f"a rehearsal needs Slurm's programs on this machine: {missing}")
    site, overrides = read_site(), with_defaults([*overrides, *overrides_of(args)], DEFAULTS)
    config, options = load_job(args.jobfile, overrides, site), options_of(args, site)
    check_size(config.resources.nodes)  # before the undisturbed run, which takes a while
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    console, table = Console(highlight=False, width=1000), Table("what", "seen", box=None, pad_edge=False)
    ranks = config.resources.nodes * config.resources.ranks_per_node
    console.print(f"undisturbed, on this machine: {args.jobfile} with {ranks} ranks; then on Slurm", markup=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the cluster and the runs are taken down
    try:
        undisturbed = run_undisturbed(folder, [args.jobfile, "--nproc-per-node", str(ranks), *overrides])
        for part, seen in rehearse(config, folder, undisturbed, options, site):
            table.add_row(part, seen)
    except (KeyboardInterrupt, SlurmError):
        shutil.rmtree(folder)
        raise
    except SupervisedRunError as error:
        table.add_row("FAILED", str(error))
        console.print(table)
        console.print(f"failed; the runs are in {folder}", markup=False)
        return 1
    shutil.rmtree(folder)
    console.print(table)
    console.print(f"passed: {config.run.name} on Slurm is identical to the undisturbed run", markup=False)
    return 0


def rehearse(
    config: Config, folder: Path, undisturbed: RunDir, options: Options, site: Site
) -> Iterator[tuple[str, str]]:
    """Submit to a private cluster, interrupt the job twice, and compare. Yield each part and what was seen.

    Raises SupervisedRunError at the first part that fails.
    """
    sizes, steps, began = config.resources, last_steps(undisturbed.metrics_log)["train"], time.monotonic()
    cpus = max(4, sizes.cpus_per_rank * sizes.ranks_per_node)  # srun needs one for each rank
    with (
        local_cluster(sizes.nodes, gpus_per_node=sizes.gpus_per_node, cpus_per_node=cpus) as cluster,
        changed(cluster.environment),
    ):
        yield "a private Slurm", f"{sizes.nodes} nodes, up in {time.monotonic() - began:.1f} s"
        run = _submit(config, folder, site)
        site_options = [name for name in NAMES if getattr(options, name) is not None]
        left_out = ", ".join([*site_options, *options.extra]) or "nothing"
        yield "submitted", f"job {run.job_id}, the script that submit sends; left out, as not of this Slurm: {left_out}"
        run.wait_for_step(steps // 4)
        preempt(folder / "above", sizes.nodes)  # Slurm sends TERM and requeues the job
        run.wait_for_attempt(2)
        yield "preempted by a job above", f"saved at step {run.end_of(1)['step']:,}, queued again by Slurm"
        run.wait_for_step(steps // 2)
        client.signal_job(run.job_id, "USR2")  # the signal that sbatch --signal sends before the time limit
        run.wait_for_attempt(3)
        yield "warned, as of its time limit", f"saved at step {run.end_of(2)['step']:,}, queued again by the run"
        ended = run.wait_for_end()
        found = (ended.state, ended.restarts, run.ends())
        if found != ("COMPLETED", 2, ["signal_term", "signal_usr2", "finished"]):
            raise SupervisedRunError(f"expected a finished run in three attempts, found {found}")
        yield "finished", f"{steps:,} steps in three allocations"
    if processes(cluster.directory) or cluster.directory.exists():
        raise SupervisedRunError(f"something is left of the cluster in {cluster.directory}")
    yield "torn down", "no process and no file is left"
    if wrong := [*run_differences(undisturbed, run.run), *gaps(run.run)]:
        raise SupervisedRunError(wrong[0])
    yield "compared", "weights, optimizer and metrics log are the same to the bit; each step is recorded once"


def _submit(config: Config, folder: Path, site: Site) -> SupervisedSlurmRun:
    """Submit as `fnet submit` does, to the partition whose jobs can be preempted."""
    run = RunDir(folder / config.run.name)
    config = config.model_copy(update={"run": config.run.model_copy(update={"root": str(folder)})})
    job = plan_job(config, Options(partition="low"), replace(site, interface=None, notify=()), run)
    return SupervisedSlurmRun(run, submit_runs(build_executor(job), job, [config], [run], run)[0].job_id)
