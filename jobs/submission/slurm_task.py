"""The function that submitit calls on every node of a job. Its arguments are paths; the settings are in config.json."""

from dataclasses import replace
from pathlib import Path

from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.attempt import restore_config
from fnet_dist.run.exit import exit_process
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import SNAPSHOT, RunDir
from jobs.errors import run_command
from jobs.launcher.node import run_node
from jobs.launcher.node_spec import NodeSpec, node_spec_in_job
from jobs.launcher.workers import chosen_interface, chosen_notify
from jobs.submission.snapshot import is_whole
from slurm.job_env import read_allocation


def run_submitted(run: str, code: str) -> None:
    """Run this node's part of the run in directory `run` with the code in directory `code`. Exit the process with the
    run's exit code, but return once the run is finished: submitit then records a success."""
    exit_code = run_command(_run, run, code)
    outcome = read_outcome(RunDir(Path(run)))
    if exit_code != 0 or outcome is None or outcome["status"] != "finished":
        exit_process(exit_code)


def _run(run_path: str, code_path: str) -> int:
    run, code = RunDir(Path(run_path)), Path(code_path)
    restore_config(run)
    config, allocation = read_config(run.config), read_allocation()
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
    return run_node(config, replace(node_spec, notify=notify))
