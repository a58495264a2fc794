"""Send runs to Slurm through submitit."""

import shutil
import time
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr
from io import StringIO

import submitit

from fnet_dist.checkpoint.resume import prepare_run
from fnet_dist.config.help import one_line
from fnet_dist.config.schema import Config
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.run_dir import RunDir, write_atomically, write_json
from jobs.submission.sbatch import SBATCH_ERRORS, Job
from jobs.submission.slurm_task import run_submitted
from jobs.submission.snapshot import take_snapshot
from slurm.errors import SlurmError
from slurm.submit_env import submission_environment

SentJob = submitit.Job[None]


def submit_runs(
    executor: submitit.AutoExecutor, job: Job, configs: Sequence[Config], runs: Sequence[RunDir], home: RunDir
) -> list[SentJob]:
    """Write the runs' directories, copy the code to `home`, and submit the job: an array if there are several runs.
    Write job.json into each run's directory. Raises SlurmError, and removes the new directories, if sbatch refuses."""
    made = [run for run in (home, *runs) if not run.path.exists()]
    try:
        for config in configs:
            prepare_run(config)  # before sbatch: the job may start at once
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if job.code != CODE_ROOT:
            take_snapshot(CODE_ROOT, home.code, configs[0].recipe)
        # submitit prints what sbatch prints, which is in the error too.
        with submission_environment(job.options), chdir(job.code), redirect_stderr(StringIO()):
            sent = executor.map_array(run_submitted, [str(run.path) for run in runs], [str(job.code)] * len(runs))
        for run, each in zip(runs, sent, strict=True):
            write_json(run.job, {"id": each.job_id, "cluster": executor.cluster, "time": time.time()})
            if executor.cluster == "slurm":
                write_atomically(run.sbatch, each.paths.submission_file.read_bytes())
        return sent
    except Exception as error:  # not after Ctrl-C: Slurm may have the job already
        for run in made:
            shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, SBATCH_ERRORS):
            raise SlurmError(one_line(f"sbatch refused: {error}")) from None
        raise
