"""Send runs to Slurm through submitit."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext, redirect_stderr
from io import StringIO
from typing import Any

import submitit

from fnet_dist.checkpoint.resume import prepare_run
from fnet_dist.config.help import one_line
from fnet_dist.config.schema import Config
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.run_dir import RunDir, write_atomically, write_json
from fnet_dist.run.sharing import closed_files, make_run_dir
from jobs.submission.sbatch import SBATCH_ERRORS, Job
from jobs.submission.slurm_task import run_submitted
from jobs.submission.snapshot import recipe_setup, snapshot_path, take_snapshot
from slurm.errors import SlurmError
from slurm.sbatch_options import Options
from slurm.site_config import Site
from slurm.submit_env import submission_environment

SentJob = submitit.Job[None]


def plan_job(
    config: Config, options: Options, site: Site, home: RunDir, *, copied: bool = True, parallel: int | None = None
) -> Job:
    """Return the job of the sizes in `config`, with the name of `home`; write nothing.

    It runs the copy of the code that submit_job puts into `home`; unless `copied`, the code where it lies.
    """
    code = snapshot_path(home.code, config.recipe) if copied else CODE_ROOT
    setup = (*site.setup, *recipe_setup(code, config.recipe))
    return Job(
        name=home.name,
        resources=config.resources,
        options=options,
        setup=setup,
        interface=site.interface,
        code=code,
        folder=home.submitit,
        parallel=parallel,
        python=site.python,
        container=site.container,
        srun_args=site.srun_args,
        notify=site.notify,
    )


def submit_job(
    executor: submitit.AutoExecutor, job: Job, recipe: str, function: Callable[..., None], *arguments: Sequence[Any]
) -> list[SentJob]:
    """Copy the code, if `job` runs a copy, and submit the calls of `function`: an array if there are several.

    `arguments` are those of the built-in map. Raises SlurmError if sbatch refuses.
    """
    if job.code != CODE_ROOT:
        take_snapshot(CODE_ROOT, job.code.parent, recipe)
    job.folder.mkdir(parents=True, exist_ok=True)  # open, if the run is shared; what submitit puts there is not
    try:
        # Slurm starts the job in the current directory. submitit prints what sbatch prints, which is in the error too.
        with (
            # submitit's own process, without Slurm, would keep the umask.
            closed_files() if executor.cluster == "slurm" else nullcontext() as umask,
            submission_environment(job.options, umask),
            chdir(job.code),
            redirect_stderr(StringIO()),
        ):
            sent: list[SentJob] = executor.map_array(function, *arguments)
    except SBATCH_ERRORS as error:
        raise SlurmError(one_line(f"sbatch refused: {error}")) from None
    return sent


def submit_runs(
    executor: submitit.AutoExecutor,
    job: Job,
    configs: Sequence[Config],
    runs: Sequence[RunDir],
    home: RunDir,
    pack: int = 1,
) -> list[SentJob]:
    """Write the runs' directories, copy the code to `home`, and submit the job: an array if there are several runs.

    `pack` of them share a task. Write job.json into each run's directory. Raises SlurmError, and removes the new
    directories, if sbatch refuses.
    """
    made = [run for run in (home, *runs) if not run.path.exists()]
    try:
        for config in configs:
            prepare_run(config)  # before sbatch: the job may start at once
        make_run_dir(home.path, configs[0].run.mode)
        tasks = [runs[first : first + pack] for first in range(0, len(runs), pack)]
        paths, code = [[str(run.path) for run in task] for task in tasks], [str(job.code)] * len(tasks)
        sent = submit_job(executor, job, configs[0].recipe, run_submitted, paths, code)
        for task, each in zip(tasks, sent, strict=True):
            for run in task:
                write_json(run.job, {"id": each.job_id, "cluster": executor.cluster, "time": time.time()})
                if executor.cluster == "slurm":
                    with closed_files():
                        write_atomically(run.sbatch, each.paths.submission_file.read_bytes())
        return sent
    except Exception:  # not after Ctrl-C: Slurm may have the job already
        for run in made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
