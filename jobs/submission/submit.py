"""Send runs to Slurm through submitit."""

import shutil
import time
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr
from io import StringIO
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fnet_dist.checkpoint.resume import prepare_run
from fnet_dist.config.help import one_line
from fnet_dist.config.schema import Config
from fnet_dist.run.run_dir import RunDir, write_atomically, write_json
from jobs.submission.sbatch import Job
from jobs.submission.slurm_task import run_submitted
from jobs.submission.snapshot import take_snapshot
from slurm.errors import SlurmError
from slurm.submit_env import submission_environment

ROOT = Path(__file__).parents[2]


SentJob = submitit.Job[None]


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
