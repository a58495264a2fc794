"""Write the sbatch script of a job, through submitit."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fnet_dist.config.slurm_resources import ResourcesConfig, limit_s
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute
from fnet_dist.run.console import fnet_command
from fnet_dist.versions import private_names
from jobs.text import figure
from slurm.sbatch_options import PATTERNS, Options

# In the directory of the code, $0, where Python finds it: pyxis starts tasks in the image's own directory. Signals stay
# blocked until there are handlers: a warning that comes while Python starts is not lost. Where env(1) cannot, as before
# coreutils 8.31, they are ignored meanwhile: the launcher knows the time limit, too. /bin/sh by its path: after
# `sbatch --export=NONE` a task has no PATH. train.sbatch has the same text.
START = (
    '/bin/sh -c \'cd -- "$0" || exit; env --block-signal=USR1,USR2,TERM true 2>/dev/null && '
    'exec env --block-signal=USR1,USR2,TERM "$@"; trap "" USR1 USR2 TERM; exec "$@"\''
)
SBATCH_ERRORS = (FailedJobError, FailedSubmissionError)  # submitit's, which exports neither
_ALL = 10**6  # tasks of an array at once: submitit takes the smaller of this and their number


@dataclass(frozen=True)
class Job:
    """A job to be submitted. `folder` is for submitit's files; `parallel`, of an array, how many tasks run at once."""

    name: str
    resources: ResourcesConfig
    options: Options
    setup: tuple[str, ...]
    interface: str | None
    code: Path
    folder: Path
    parallel: int | None = None
    python: str | None = None  # None: the one that runs now
    container: tuple[str, ...] = ()  # words before it, on each node
    srun_args: tuple[str, ...] = ()
    notify: tuple[str, ...] = ()  # the site's command for notices


def build_executor(job: Job, cluster: str = "slurm") -> submitit.AutoExecutor:
    """Return submitit's executor for `job`; write nothing. Raises ConfigError if there is no Slurm, or for a path that
    sbatch would not take as it is."""
    code, interpreter = absolute(job.code), job.python or str(absolute(Path(sys.executable)))
    for path in (code, job.folder, interpreter):
        if not str(path).isprintable() or set(str(path)) & set("%\\'\"`$"):
            raise ConfigError(f"{str(path)!r}: sbatch takes no path with % \\ ' \" ` $ or a line break; move it")
    sizes, options = job.resources, job.options
    if cluster == "local" and sizes.nodes > 1:
        raise ConfigError(f"resources.nodes is {sizes.nodes}, this machine is one; use --nodes 1, or --nproc-per-node")
    cpus, gpus = sizes.cpus_per_rank * sizes.ranks_per_node, sizes.gpus_per_node or None
    typed_gpus = f"{options.gpu_type}:{gpus}" if gpus and options.gpu_type else gpus
    python = f"{START} {shlex.join([str(code), *job.container, interpreter])}"
    try:
        executor = submitit.AutoExecutor(job.folder, cluster=cluster, slurm_python=python)
    except RuntimeError as error:
        raise ConfigError(
            f"no Slurm here: {error} Submit from a login node, use --cluster local, or `{fnet_command()} cluster up`"
        ) from None
    executor.update_parameters(
        name=job.name,
        nodes=sizes.nodes,
        tasks_per_node=1,  # a launcher, which starts the ranks
        cpus_per_task=cpus,
        gpus_per_node=gpus,
        mem_gb=sizes.mem_gb,
        timeout_min=-(-limit_s(sizes.time) // 60),  # rounded up: Slurm counts minutes
        stderr_to_stdout=True,  # one file for each node, in the order of the lines
        **{f"slurm_{name}": getattr(options, name) for name in PATTERNS},
        slurm_gpus_per_node=typed_gpus,
        slurm_array_parallelism=job.parallel or _ALL,
        slurm_setup=_setup(job),
        # A task that fails ends the job at once; one that succeeds does not, however long the others take.
        slurm_srun_args=[
            "--kill-on-bad-exit=1",
            "--wait=0",
            f"--cpus-per-task={cpus}",
            *job.srun_args,
        ],
        slurm_additional_parameters={
            "requeue": True,  # some sites set JobRequeue=0
            "chdir": str(code),
            "signal": f"USR2@{sizes.warning_s}",  # SUBMITIT_PREEMPT_SIGNAL would change submitit's own
            **options.extra,
        },
    )
    if cluster == "slurm":
        # submitit's own default is the key "submitit", which a site that enforces keys refuses. Its public method takes
        # None for "left out".
        with private_names("submitit"):
            executor._executor.parameters["wckey"] = options.wckey
    return executor


def script(executor: submitit.AutoExecutor, tasks: int = 1) -> str:
    """Return the script that the executor sends to sbatch; of an array if there are several `tasks`."""
    with private_names("submitit"):  # it has no public name for the text
        slurm: Any = executor._executor
        if tasks > 1:
            slurm.parameters["map_count"] = tasks  # as its map_array does
        text: str = slurm._make_submission_file_text(slurm._submitit_command_str, "")
        slurm.parameters.pop("map_count", None)
    return text


def _setup(job: Job) -> list[str]:
    """Return the script's setup lines: the site's, each of which has to succeed, and the ranks' environment."""
    # By its number: colleagues may read the log of a shared run, and a line may hold a key.
    failed = "error: entry {} of `setup` in site.toml failed"
    lines = [
        f"{{ {line}\n}} || {{ echo {shlex.quote(failed.format(number))} >&2; exit 1; }}"
        for number, line in enumerate(job.setup, 1)
    ]
    lines.append(f"export OMP_NUM_THREADS={job.resources.cpus_per_rank}")
    if job.interface is not None:
        lines.append(f"export GLOO_SOCKET_IFNAME=${{GLOO_SOCKET_IFNAME:-{job.interface}}}")
    if job.notify:
        lines.append(f"export FNET_NOTIFY={shlex.quote(shlex.join(job.notify))}")
    return lines


def cost_ceiling(resources: ResourcesConfig, tasks: int = 1) -> str:
    """Return the most that a job can cost: each allocation up to its time limit, and all requeues that are allowed."""
    allocations = resources.max_requeues + 1
    hours = resources.nodes * limit_s(resources.time) / 3600 * allocations * tasks
    gpus = resources.gpus_per_node
    amount = hours * (gpus or resources.cpus_per_rank * resources.ranks_per_node)
    limit = f"{allocations * tasks} allocations of {limit_s(resources.time) / 60:g} min"
    return f"up to {figure(amount)} {'GPU' if gpus else 'CPU'}-hours: {limit}, if it is requeued that often"
