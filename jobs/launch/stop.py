"""python -m jobs stop RUN: ask a run for a checkpoint and an end, by the file STOP in its directory."""

import argparse
from collections.abc import Sequence

from fnet_dist.attempt import is_living, last_attempt
from fnet_dist.errors import ConfigError
from fnet_dist.run_dir import read_json, read_outcome
from jobs.runs import find, queued_jobs


def main(argv: Sequence[str]) -> int:
    """Make the file and say who will find it. Raises ConfigError if the run is finished, or nobody runs it."""
    parser = argparse.ArgumentParser(prog="python -m jobs stop", description="Checkpoint, then end.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory; the newest if left out")
    run = find(parser.parse_args(argv).run)
    outcome = read_outcome(run)
    if outcome is not None and outcome["status"] == "finished":
        raise ConfigError(f"{run.path} is finished since step {outcome['step']:,}; there is nothing to stop")
    last = last_attempt(run)
    if (last is None or not is_living(last)) and (jobs := queued_jobs(run)):
        run.stop.touch()
        print(
            f"{run.name}: job {jobs[0].job_id} will stop when it starts; python -m jobs cancel {run.name} ends it now"
        )
        return 0
    if last is None or not is_living(last):
        raise ConfigError(f"{run.path} is not running; to stop its next start before the first step: touch {run.stop}")
    run.stop.touch()
    owner = read_json(last.begin)
    print(f"{run.name}: asked attempt {last.number}, pid {owner['pid']} on {owner['host']}, to save and stop")
    return 0
