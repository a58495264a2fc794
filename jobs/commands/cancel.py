"""fnet cancel RUN: end the run's Slurm job now, without a checkpoint (start and end 5)

It cancels every job of the run that is queued or running, as scancel does; a job's id cancels that job, an array's id
all its runs. A job that other runs share (sweep --pack) is cancelled by its id only. The run keeps its last checkpoint:
submit it again to resume from there. `fnet stop RUN` saves first.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from fnet_dist.errors import ConfigError
from fnet_dist.run.console import command_for, fnet_command
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.sharing import other_owner, share_files
from jobs.monitor.slurm_queue import run_job_of
from jobs.runs import check_control, command_parser, find_run_or_job, queued_jobs, run_root, runs_of_job
from slurm import client
from slurm.errors import SlurmError
from slurm.site_config import read_site


def main(argv: Sequence[str]) -> int:
    """Cancel the jobs and print them. Raises ConfigError if no job of the run is queued or running."""
    text = command_parser(__doc__).parse_args(argv).run
    site = read_site()
    if len(named := runs_of_job(text, run_root())) > 1:  # an array's id, or that of a task which several runs share
        for name in named:
            check_control(RunDir(run_root() / name), site)
        ended = {name: job_id for name, job_id in named.items() if _trains(job_id, RunDir(run_root() / name))}
        _cancel(text, RunDir(run_root() / next(iter(named))))
        for name, job_id in ended.items():
            _remember(RunDir(run_root() / name), job_id)
        print(f"job {text} is cancelled: {', '.join(ended) or 'all its runs had ended'}")
        return 0
    run = find_run_or_job(text)
    check_control(run, site)
    jobs = queued_jobs(run)
    if not jobs:
        raise ConfigError(f"no Slurm job of {run.path} is queued or running; see {fnet_command()} status {run.name}")
    for job in jobs:
        if others := _others_in(job.job_id, run):
            raise ConfigError(
                f"job {job.job_id} also trains {', '.join(others)}; {fnet_command()} stop {run.name} saves and ends "
                f"this run alone, {fnet_command()} cancel {job.job_id} ends all of them now"
            )
    for job in jobs:
        _cancel(job.job_id, run)
        _remember(run, job.job_id)
        print(f"{run.name}: job {job.job_id} ({job.state.lower()}) is cancelled")
    return 0


def _others_in(job_id: str, run: RunDir) -> list[str]:
    """Return the other runs that a cancelled job would end."""
    root = run.path.parent
    return [name for name in runs_of_job(job_id, root) if name != run.name and _trains(job_id, RunDir(root / name))]


def _trains(job_id: str, run: RunDir) -> bool:
    """Return True if the job is the newest of `run`, and the run has not ended in it for good."""
    job = run_job_of(run)
    return job is not None and job.job_id == job_id and not job.is_over


def _cancel(job_id: str, run: RunDir) -> None:
    """Cancel a job of `run`. Raises SlurmError with what else ends it, if Slurm keeps it for its own user."""
    try:
        client.cancel(job_id)
    except SlurmError as error:
        if (owner := other_owner(run)) is None:
            raise
        hint = f"only {owner} or an operator cancels this job; `{command_for(run, 'stop')}` saves and ends it"
        raise SlurmError(f"{error}; {hint}") from None


def _remember(run: RunDir, job_id: str) -> None:
    """Write into job.json that the job was cancelled: Slurm forgets a job minutes after its end."""
    submitted = read_json(run.job) or {}
    if submitted.get("id") != job_id:  # the job of an sbatch script, or an earlier one
        submitted = {"id": job_id, "cluster": "slurm", "time": time.time()}
    share_files(run.path)
    with suppress(OSError):  # another user's directory: the job is cancelled all the same
        write_json(run.job, {**submitted, "cancelled": time.time()})
