"""fnet stop RUN: save a checkpoint, then end (start and end 4)

The request is the file STOP in the run's directory. Rank 0 looks for it, on whichever machine it is.
"""

from collections.abc import Sequence

from fnet_dist.errors import ConfigError
from fnet_dist.processes import quoted
from fnet_dist.run.attempt import is_alive, last_attempt
from fnet_dist.run.console import fnet_command
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.sharing import share_files
from jobs.monitor.job_state import read_statuses
from jobs.monitor.run_state import Status
from jobs.runs import check_control, command_parser, find_run_or_job
from slurm.site_config import read_site

TO_START = ("queued", "requeued", "submitted")  # states of a job in which no attempt runs that could see the file


def main(argv: Sequence[str]) -> int:
    """Make the file and print who will find it. Raises ConfigError if the run is finished or does not run."""
    run = find_run_or_job(command_parser(__doc__).parse_args(argv).run)
    check_control(run, read_site())
    (status,), snapshot = read_statuses([run])
    outcome = read_outcome(run)
    is_over = status.state.ended or status.state.word == "ending"
    if is_over and outcome is not None and outcome["status"] == "finished":
        raise ConfigError(f"{run.path} is finished since step {outcome['step']:,}; there is nothing to stop")
    if status.state.ended:
        job = "" if status.run_job is None else f", job {status.run_job.job_id} has ended ({status.state.word})"
        raise ConfigError(
            f"{run.path} is not running{job}; to stop its next start before the first step: touch {quoted(run.stop)}"
        )
    share_files(run.path)
    run.stop.touch()
    print(f"{run.name}: {_who_finds_it(run, status, snapshot.note)}")
    return 0


def _who_finds_it(run: RunDir, status: Status, slurm: str) -> str:
    last, run_job = last_attempt(run), status.run_job
    if run_job is None or (status.state.word not in TO_START and last is not None and is_alive(last)):
        if last is None:
            return "its first attempt will stop before the first step"
        owner = last.read_begin()
        return f"asked attempt {last.number}, pid {owner['pid']} on {owner['host']}, to save and stop"
    job = f"job {run_job.job_id} ({status.state.word})"
    if status.slurm_job is None:
        return f"{job} will stop if it starts; whether it does is not known: {slurm}"
    return f"{job} will stop when it starts; {fnet_command()} cancel {run_job.job_id} ends it now"
