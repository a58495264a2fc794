"""The function that submitit calls on every node of a job. Its arguments are paths; the settings are in config.json."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.attempt import restore_config
from fnet_dist.run.exit import exit_process
from fnet_dist.run.git import SNAPSHOT
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from jobs.errors import run_command
from jobs.launcher.node import run_node
from jobs.launcher.node_spec import NodeSpec, node_spec_in_job
from jobs.launcher.pack import run_side_by_side, take_place
from jobs.launcher.workers import chosen_interface, chosen_notify
from jobs.submission.snapshot import is_whole
from slurm.job_env import read_allocation


def run_submitted(runs: Sequence[str], code: str) -> None:
    """Run this node's part of the run in a directory with the code in directory `code`, or several runs side by side.

    Exit the process with the run's exit code, but return once all are finished: submitit then records a success.
    """
    exit_code = run_command(_run, runs[0], code) if len(runs) == 1 else run_command(_run_packed, runs, code)
    outcomes = [read_outcome(RunDir(Path(run))) for run in runs]
    if exit_code != 0 or any(outcome is None or outcome["status"] != "finished" for outcome in outcomes):
        exit_process(exit_code)


def _run_packed(runs: Sequence[str], code: str) -> int:
    allocation = read_allocation()
    assert allocation is not None  # `fnet sweep` submits to Slurm alone
    command = [sys.executable, "-m", __name__, code]
    return run_side_by_side([RunDir(Path(run)) for run in runs], command, allocation)


def _run(run_path: str, code_path: str, place: str = "") -> int:
    """Run this node's part of a run; `place` is that of one which shares the task with others."""
    run, code, allocation, ask_slurm = RunDir(Path(run_path)), Path(code_path), read_allocation(), None
    if allocation is not None and place:
        allocation, ask_slurm = take_place(place, allocation)
    restore_config(run)
    config = read_config(run.config)
    sizes = config.resources
    if code.resolve() != CODE_ROOT.resolve():
        raise ConfigError(f"{CODE_ROOT} is what runs, {code} was submitted; unset PYTHONSAFEPATH and PYTHONPATH")
    snapshot = CODE_ROOT if (CODE_ROOT / SNAPSHOT).exists() else None
    if snapshot is not None and not is_whole(snapshot):
        raise ConfigError(f"{snapshot} is not the code that was submitted: it has changed since; submit again")
    if allocation is None:  # submitit's local executor
        node_spec = NodeSpec(1, 0, sizes.ranks_per_node, code=snapshot)
    else:
        interface = chosen_interface()  # the script has set it, where site.toml names one
        node_spec = node_spec_in_job(allocation, sizes.ranks_per_node, sizes.warning_s, interface, snapshot)
    notify = chosen_notify() or ()  # the script has set it too
    return run_node(config, replace(node_spec, notify=notify, ask_slurm=ask_slurm))


if __name__ == "__main__":  # as a launcher of several in one task, started by run_side_by_side
    code, run, place = sys.argv[1:]
    exit_process(run_command(_run, run, code, place))
