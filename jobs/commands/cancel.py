"""fnet cancel RUN: end the run's Slurm job now, without a checkpoint (start and end 5)

It cancels every job of the run that is queued or running, as scancel does; a job's id cancels that job, an array's id
all its runs. The run keeps its last checkpoint: submit it again to resume from there. `fnet stop RUN` saves first.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from fnet_dist.errors import ConfigError
from fnet_dist.run.console import fnet_command
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.runs import command_parser, find_run_or_job, queued_jobs, run_root, runs_of_array
from slurm import client


def main(argv: Sequence[str]) -> int:
    """Cancel the jobs and print them. Raises ConfigError if no job of the run is queued or running."""
    text = command_parser(__doc__).parse_args(argv).run
    if array := runs_of_array(text, run_root()):  # the id of an array names all its runs
        client.cancel(text)
        for job_id, name in array.items():
            _remember(RunDir(run_root() / name), job_id)
        print(f"job {text} is cancelled: {', '.join(array.values())}")
        return 0
    run = find_run_or_job(text)
    jobs = queued_jobs(run)
    if not jobs:
        raise ConfigError(f"no Slurm job of {run.path} is queued or running; see {fnet_command()} status {run.name}")
    for job in jobs:
        client.cancel(job.job_id)
        _remember(run, job.job_id)
        print(f"{run.name}: job {job.job_id} ({job.state.lower()}) is cancelled")
    return 0


def _remember(run: RunDir, job_id: str) -> None:
    """Write into job.json that the job was cancelled: Slurm forgets a job minutes after its end."""
    submitted = read_json(run.job) or {}
    if submitted.get("id") != job_id:  # the job of an sbatch script, or an earlier one
        submitted = {"id": job_id, "cluster": "slurm", "time": time.time()}
    with suppress(OSError):  # another user's directory: the job is cancelled all the same
        write_json(run.job, {**submitted, "cancelled": time.time()})
