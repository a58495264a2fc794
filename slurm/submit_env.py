"""The environment of a submission: what sbatch sees, and hands on to the job."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from slurm.job_env import clean_environment
from slurm.sbatch_options import VARIABLES, Options

# sbatch(1): these stand above the script's own lines. What the script says is what is to run.
_ABOVE_THE_SCRIPT = (
    *("SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SBATCH_CPUS_PER_GPU", "SBATCH_CPUS_PER_TASK"),
    *("SBATCH_ERROR", "SBATCH_EXPORT", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_INPUT"),
    *("SBATCH_JOB_NAME", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU", "SBATCH_MEM_PER_NODE", "SBATCH_NO_REQUEUE"),
    *("SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_REQUEUE", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT", "SBATCH_WAIT"),
)


def variables() -> dict[str, str]:
    """The environment as it is."""
    return dict(os.environ)


@contextmanager
def changed(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, `environment` stands above the process's own: another cluster's, say."""
    before = variables()
    try:
        os.environ.update(environment)
        yield
    finally:
        _become(before)


@contextmanager
def submission_environment(options: Options) -> Iterator[None]:
    """Inside, the process's environment is what sbatch may see: nothing of a job that we are in ourselves, and nothing
    that says otherwise than the script."""
    before = variables()
    decided = {variable: getattr(options, name) for name, variable in VARIABLES.items()}
    kept = {name: value for name, value in clean_environment(before).items() if name not in _ABOVE_THE_SCRIPT}
    try:
        _become(kept | {name: value for name, value in decided.items() if value is not None})
        yield
    finally:
        _become(before)


def _become(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
