"""What the verbs share: where a site keeps its runs, which one a person means, and what a job file asks for there."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fnet_dist.config.load import load_config
from fnet_dist.config.schema import Config, DataConfig
from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import list_attempts
from fnet_dist.run.run_dir import RunDir, find_run, read_json
from slurm import client
from slurm.site_config import Site, read_site
from slurm.types import QueuedJob

JOB_ID = r"\d+(_\d+)?"


def load_job(jobfile: str, overrides: Sequence[str], site: Site) -> Config:
    """The settings of a job file at `site`: command line over environment over job file over site over default."""
    below = {"run.root": site.run_root, "data.root": site.data_root if "root" in DataConfig.model_fields else None}
    given = {name: text for name, text in below.items() if text is not None}
    return load_config(["--config", jobfile, *overrides], below=given)


def with_defaults(overrides: Sequence[str], defaults: Mapping[str, str]) -> list[str]:
    """Return `overrides` and those `defaults` ({"--section.key": value}) that are not among them."""
    given = {word.partition("=")[0].replace("_", "-") for word in overrides}
    return [*overrides, *(word for name, value in defaults.items() if name not in given for word in (name, value))]


def run_root() -> Path:
    """Where runs are: `run_root` of slurm/site.toml, else `runs`."""
    return Path(read_site().run_root or "runs").expanduser()


def find_run_or_job(text: str | None, root: Path | None = None) -> RunDir:
    """The run that a person means: its name, its directory, a Slurm job's id, or the newest. Raises ConfigError."""
    root = run_root() if root is None else root
    if text is not None and re.fullmatch(JOB_ID, text) and not RunDir(root / text).config.exists():
        for run in map(RunDir, root.glob("*")):
            if os.access(run.config, os.R_OK) and text in job_ids(run):  # of what is no run, or another's, nothing
                return RunDir(run.path.resolve())
        if array := runs_of_array(text, root):
            one = next(iter(array))
            raise ConfigError(
                f"job {text} is an array of {len(array)} runs: {', '.join(array.values())}; name one: {one}"
            )
        raise ConfigError(f"no run in {root.absolute()} was a part of Slurm job {text}; runs elsewhere: by directory")
    return find_run(text, root)


def runs_of_array(job_id: str, root: Path) -> dict[str, str]:
    """The runs in `root` that are tasks of the array `job_id`: the name of each by its task's id."""
    runs = [run for run in map(RunDir, sorted(root.glob("*"))) if os.access(run.config, os.R_OK)]
    return {each: run.name for run in runs for each in job_ids(run) if each.startswith(f"{job_id}_")}


def display_name(run: RunDir) -> str:
    """What a person types to mean `run`: its name where verbs look for runs, else its directory."""
    return run.name if run.path.absolute().parent == run_root().absolute() else shlex.quote(str(run.path))


def job_ids(run: RunDir) -> list[str]:
    """The ids of the Slurm jobs that have trained `run`, or are to, the newest first."""
    submitted = read_json(run.job)
    begun = [read_json(attempt.begin)["slurm_job_id"] for attempt in reversed(list_attempts(run))]
    sent = None if submitted is None or submitted["cluster"] != "slurm" else submitted["id"]
    found = [sent, *begun]
    return [*dict.fromkeys(text for text in found if text is not None)]


def queued_jobs(run: RunDir) -> list[QueuedJob]:
    """The Slurm jobs of `run` that are queued or running. Raises SlurmError if Slurm does not say."""
    ids = job_ids(run)
    return [job for job in client.queue() if job.job_id in ids] if ids else []
