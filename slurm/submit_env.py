"""The environment of a submission, which sbatch reads and passes on to the job."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from slurm.job_env import clean_environment
from slurm.sbatch_options import VARIABLES, Options

# sbatch(1), INPUT ENVIRONMENT VARIABLES: these override the script's #SBATCH lines, which decide what runs.
_OVERRIDE_THE_SCRIPT = (
    *("SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SBATCH_CPUS_PER_GPU", "SBATCH_CPUS_PER_TASK"),
    *("SBATCH_ERROR", "SBATCH_EXPORT", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_INPUT"),
    *("SBATCH_JOB_NAME", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU", "SBATCH_MEM_PER_NODE", "SBATCH_NO_REQUEUE"),
    *("SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_REQUEUE", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT", "SBATCH_WAIT"),
)


def variables() -> dict[str, str]:
    """Return a copy of the environment."""
    return dict(os.environ)


def changed(environment: Mapping[str, str]) -> AbstractContextManager[None]:
    """Update os.environ with `environment` inside the block: another cluster's SLURM_CONF, for example."""
    return _replaced({**variables(), **environment})


def submission_environment(options: Options, umask: int | None = None) -> AbstractContextManager[None]:
    """Inside the block, remove from os.environ the variables of an enclosing job and those that override the script.

    The job gets `umask`, or else that of this process.
    """
    chosen = {variable: getattr(options, name) for name, variable in VARIABLES.items()}
    kept = {name: text for name, text in clean_environment(os.environ).items() if name not in _OVERRIDE_THE_SCRIPT}
    chosen["SLURM_UMASK"] = None if umask is None else f"{umask:04o}"  # sbatch and srun take it for their own
    return _replaced(kept | {name: text for name, text in chosen.items() if text is not None})


@contextmanager
def _replaced(environment: Mapping[str, str]) -> Iterator[None]:
    before = variables()
    try:
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
