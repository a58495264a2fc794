"""python -m jobs submit JOBFILE: send a run to Slurm, through submitit."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr
from io import StringIO
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fnet_dist.checkpoint.resume import check_run, choose_run, prepare_run
from fnet_dist.config.help import one_line, settings_help
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import Runtime
from fnet_dist.run.console import final_table, how_to_go_on, python_command
from fnet_dist.run.run_dir import RunDir, read_json, read_outcome, run_of, write_atomically, write_json, written
from jobs.runs import load_job, named
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from jobs.submission.preflight import refuse, refuse_here
from jobs.submission.sbatch import Job, build_executor, ceiling, script
from jobs.submission.slurm_task import run_submitted
from jobs.submission.snapshot import code_files, digest_of, take_snapshot
from slurm import client
from slurm.errors import NoAnswerError, SlurmError
from slurm.site_config import read_site
from slurm.submit_env import submission_environment

ROOT = Path(__file__).parents[2]
LOOK_EVERY_S = 2.0
SentJob = submitit.Job[None]


def main(argv: Sequence[str]) -> int:
    """Submit, and say how to watch. Raises ConfigError or SlurmError, one line, before anything is written."""
    if {"-h", "--help"} & set(argv):
        print(_parser().format_help() + "\n" + settings_help())
        return 0
    asked, overrides = _parser().parse_known_args(argv)
    site = read_site()
    config = load_job(asked.jobfile, [*overrides, *overrides_of(asked)], site)
    options = options_of(asked, site)
    if check_run(config) is not None:
        run = run_of(config)
        print(f"finished before, nothing is submitted now: {run.path}\n{how_to_go_on(run)}\n{final_table(run)}")
        return 0
    run = RunDir(choose_run(config, Runtime()).path.absolute())
    code = ROOT if asked.no_snapshot else run.code / digest_of(ROOT, code_files(ROOT))
    job = Job(run.name, config.resources, options, site.setup, site.interface, code, run.submitit)
    executor = build_executor(job, asked.cluster)
    try:
        refuse(config, [run], options, site.run_root) if asked.cluster == "slurm" else refuse_here(config, run)
    except SlurmError as error:
        if not asked.dry_run:
            raise
        print(f"not checked against a cluster: {error}", file=sys.stderr)
    if asked.dry_run:
        print(
            script(executor) if asked.cluster == "slurm" else "# submitit starts it on this machine, without a script"
        )
        print(f"# on each node: python -m jobs run {run.config} --nproc-per-node {config.resources.ranks_per_node}")
        return 0
    sent = submit_runs(executor, job, [config], [run], run)[0]
    at_most = ceiling(config.resources) if asked.cluster == "slurm" else "a process on this machine"
    if asked.json:
        print(json.dumps({"run": str(run.path), "job_id": sent.job_id, "at_most": at_most}))
    else:
        print(f"submitted: job {sent.job_id}, {at_most}; run directory {run.path}")
        print(f"to watch: {python_command()} -m jobs logs -f {named(run)}")
    return _wait(run, sent) if asked.wait else 0


def submit_runs(
    executor: submitit.AutoExecutor, job: Job, configs: Sequence[Config], runs: Sequence[RunDir], home: RunDir
) -> list[SentJob]:
    """Write the runs' directories, and the code to `home`, and send the job, an array where there are several runs.

    What was made for a job that Slurm refuses is removed again.
    """
    made = [run for run in (home, *runs) if not run.path.exists()]
    try:
        for config in configs:
            prepare_run(config)
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if job.code != ROOT:
            take_snapshot(ROOT, home.code)
        return _send(executor, job, runs)
    except Exception:  # after Ctrl-C nobody knows whether Slurm has the job
        for run in made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _send(executor: submitit.AutoExecutor, job: Job, runs: Sequence[RunDir]) -> list[SentJob]:
    """Hand the job to sbatch, and note it in each run's directory. Raises SlurmError if it is refused."""
    try:
        with submission_environment(job.options), chdir(job.code), redirect_stderr(StringIO()):  # the error has it all
            sent = executor.map_array(run_submitted, [str(run.path) for run in runs], [str(job.code)] * len(runs))
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(one_line(f"sbatch refused: {error}")) from None
    for run, each in zip(runs, sent, strict=True):
        write_json(run.job, {"id": each.job_id, "cluster": executor.cluster, "time": time.time()})
        if executor.cluster == "slurm":
            write_atomically(run.sbatch, each.paths.submission_file.read_bytes())
    return sent


def _wait(run: RunDir, sent: SentJob) -> int:
    """Wait until the job has left the queue; the run's exit code, or 1 if the job ended without one."""
    began = read_json(run.job)["time"]
    if isinstance(sent, submitit.SlurmJob):
        while _is_queued(sent.job_id):
            time.sleep(LOOK_EVERY_S)
    else:
        sent.wait()
    outcome = read_outcome(run)
    if outcome is None or written(run.outcome) < began:
        print(f"error: job {sent.job_id} ended before the run began; see {run.submitit}", file=sys.stderr)
        return 1
    return outcome["exit_code"]


def _is_queued(job_id: str) -> bool:
    """Whether the job waits or runs; while slurmctld is away, it does."""
    try:
        return bool(client.queue([job_id]))
    except NoAnswerError:
        return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs submit",
        usage="python -m jobs submit JOBFILE [-N NODES] [--gpus-per-node N] [-t TIME] [-p PARTITION] [--dry-run] "
        "[--section.key VALUE ...]",
        description="Send a run to Slurm; on a warning before the time limit it saves, and goes on in another "
        "allocation.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file, or a run's config.json")
    add_submission_flags(parser)
    parser.add_argument(
        "--cluster", choices=["slurm", "local"], default="slurm", help="local: on this machine, without Slurm"
    )
    parser.add_argument("--wait", action="store_true", help="until the job has ended, with the run's exit code")
    parser.add_argument("--json", action="store_true", help="print the job as JSON")
    return parser
