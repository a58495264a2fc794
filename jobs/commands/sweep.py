"""fnet sweep JOBFILE K=V,V ...: one Slurm array, one run for each combination of values (start and end)"""

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from fnet_dist.checkpoint.resume import check_run
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.run.console import python_command
from fnet_dist.run.run_dir import SWEEPS, RunDir, run_dir_of
from jobs.runs import display_name, load_job, queued_jobs
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from jobs.submission.preflight import check_job
from jobs.submission.sbatch import Job, build_executor, cost_ceiling, script
from jobs.submission.snapshot import code_files, digest_of
from jobs.submission.submit import ROOT, submit_runs
from slurm.site_config import read_site

MOST_CELLS = 1000  # Slurm's own limit is MaxArraySize, 1001 by default


def main(argv: Sequence[str]) -> int:
    """Submit the combinations that are not finished, and list all. Raises ConfigError before anything is written."""
    asked, rest = _parser().parse_known_args(argv)
    keys = [word for word in rest if re.fullmatch(r"\w+\.[\w-]+=.*", word)]
    overrides = [*(word for word in rest if word not in keys), *overrides_of(asked)]
    site = read_site()
    options = options_of(asked, site)
    cells = [*_cells(keys)]
    group = f"{Path(asked.jobfile).stem}-{hashlib.sha256(' '.join(rest).encode()).hexdigest()[:6]}"
    configs = [load_job(asked.jobfile, [*overrides, *cell, "--tracking.group", group], site) for cell in cells]
    first = configs[0]
    stands = [_stands(config) for config in _checked(configs)]
    for cell, config, how in zip(cells, configs, stands, strict=True):
        print(f"{config.run.name:<40} {' '.join(cell)}{f'  ({how})' if how else ''}")
    left = [config for config, how in zip(configs, stands, strict=True) if how is None]
    if not left:
        return 0
    home = RunDir(run_dir_of(first).path.absolute().parent / SWEEPS / group)
    code = ROOT if asked.no_snapshot else home.code / digest_of(ROOT, code_files(ROOT))
    job = Job(group, first.resources, options, site.setup, site.interface, code, home.submitit, asked.max_parallel)
    executor = build_executor(job)
    runs = [RunDir(run_dir_of(config).path.absolute()) for config in left]
    check_job(left[0], runs, options, site.run_root)
    if asked.dry_run:
        print(script(executor, len(left)))
        return 0
    sent = submit_runs(executor, job, left, runs, home)
    job_id = sent[0].job_id.partition("_")[0]
    print(f"submitted: job {job_id}, {len(left)} runs, {cost_ceiling(first.resources, len(left))}")
    print(
        f"to watch: {python_command()} -m jobs status --watch; to end all: {python_command()} -m jobs cancel {job_id}"
    )
    names = [display_name(RunDir(run_dir_of(config).path)) for config in configs]
    print(f"to compare: {python_command()} -m jobs report {' '.join(names)}")
    return 0


def _cells(keys: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of values, as overrides."""
    if not keys:
        raise ConfigError("nothing to sweep over: expected KEY=VALUE,VALUE, like optim.lr=0.001,0.003")
    split = [(key, values.split(",")) for key, _, values in (word.partition("=") for word in keys)]
    names = [key for key, _ in split]
    if len({*names}) < len(names):
        raise ConfigError(f"a key is swept over twice: {', '.join(names)}; give all its values at once")
    for values in product(*(values for _, values in split)):
        yield [word for key, value in zip(names, values, strict=True) for word in (f"--{key}", value)]


def _stands(config: Config) -> str | None:
    """Why a run is not to be submitted: it is finished, or a job has it; None if it is."""
    if (outcome := check_run(config)) is not None:
        return f"finished, {outcome['step']:,} steps"
    return next((f"{job.state.lower()}, job {job.job_id}" for job in queued_jobs(run_dir_of(config))), None)


def _checked(configs: Sequence[Config]) -> Sequence[Config]:
    """`configs`. Raises ConfigError if they are not runs and sizes for one array."""
    names = [config.run.name for config in configs]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{names.count(twice)} combinations are one run, {twice}; sweep over what changes the result")
    if any(config.resources != configs[0].resources for config in configs):
        raise ConfigError("the tasks of an array have one size; sweep over other settings than resources.*")
    if len(configs) > MOST_CELLS:
        raise ConfigError(f"{len(configs):,} combinations, expected at most {MOST_CELLS:,} in one array")
    return configs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnet sweep",
        usage="fnet sweep JOBFILE KEY=V,V ... [--max-parallel N] [--dry-run] [--section.key VALUE ...]",
        description="One Slurm array, one run for each combination of values; started again, it submits those that "
        "are not finished. `python -m jobs report` compares them.",
        allow_abbrev=False,
    )
    parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="how many run at once; left out, all")
    add_submission_flags(parser)
    return parser
