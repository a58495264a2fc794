"""fnet workspace [RUN|GROUP]: make or update a view of the project in W&B (look 6)

It shows all runs of RUN's project (without an argument, of the newest run's), or those of a GROUP such as a sweep's.
Needs pip install -e '.[workspace]'.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.run_dir import RunDir, mtime, read_manifest
from jobs.cells import find_runs, group_of
from jobs.runs import command_parser, find_run_or_job, run_root

PROBE_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Save the view and print its URL.

    Raises ConfigError if there is no such run or group, no library, no key or no project yet; FnetError if W&B does
    not take the view.
    """
    parser = command_parser(__doc__)
    about = "a run's name, directory or Slurm job id, or a group (tracking.group); left out, the newest run"
    parser.add_argument("name", nargs="?", metavar="RUN|GROUP", help=about)
    run, group = find_run_or_group(parser.parse_args(argv).name)
    print(_save(run, group))
    return 0


def find_run_or_group(text: str | None) -> tuple[RunDir, str | None]:
    """Return the run that `text` names and None, or the newest run of the group or sweep `text` and its group.

    Raises ConfigError, which names the groups, if there is neither.
    """
    try:
        return find_run_or_job(text), None
    except ConfigError as error:
        if text is None:
            raise
        groups, group = _groups(), text
        if group not in groups:
            with suppress(ConfigError):
                group = group_of(find_runs(text)[0])  # a sweep's directory or job id
        if group not in groups:
            there = ", ".join([*groups][:5]) or "none"
            raise ConfigError(f"{error}; nor is it a group (tracking.group); newest there: {there}") from None
        return groups[group], group


def _groups() -> dict[str, RunDir]:
    """Return {group: its newest run}, the newest first."""
    runs = [run for path in run_root().glob("*") if os.access((run := RunDir(path)).config, os.R_OK)]
    found: dict[str, RunDir] = {}
    for run in sorted(runs, key=lambda run: mtime(run.config), reverse=True):
        if (group := group_of(run)) is not None:
            found.setdefault(group, run)
    return found


def _save(run: RunDir, group: str | None) -> str:
    """Save the view for the project, metrics and monitored value of `run`; return its URL."""
    manifest = read_manifest(run)
    try:
        from fnet_dist.tracking import mode, row_reader, wandb_run, workspace  # here: it takes a second
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wandb_workspaces":
            raise
        raise ConfigError("the library of W&B's views is missing: pip install -e '.[workspace]'") from None
    wandb_run.prepare_sdk()
    if problem := mode.why_not_online(PROBE_S):
        raise ConfigError(f"W&B cannot be reached from here: {problem}; see WANDB_API_KEY, WANDB_BASE_URL, wandb login")
    metrics, monitor = row_reader.metric_directions(run), manifest.get("monitor", "accuracy")
    try:
        return workspace.save_view(workspace.place_of(run), group, metrics, monitor)
    except Exception as error:  # the SDK raises many types
        if not mode.is_sdk_error(error):
            raise
        raise FnetError(f"W&B has not taken the view: {mode.describe_sdk_error(error)}") from None
