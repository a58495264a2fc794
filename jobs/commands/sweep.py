"""fnet sweep JOBFILE K=V,V ...: one Slurm array, one run for each combination of values (start and end 3)

Started again, it submits those that are not finished. The sweep has a name, which `fnet status` and `fnet report` take.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from fnet_dist.checkpoint.resume import check_run
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute, quoted
from fnet_dist.run.console import fnet_command, short_path
from fnet_dist.run.run_dir import SWEEPS, RunDir, run_dir_of
from jobs.runs import command_parser, load_job, queued_jobs, run_root
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from jobs.submission.preflight import check_job
from jobs.submission.sbatch import build_executor, cost_ceiling, script
from jobs.submission.submit import plan_job, submit_runs
from slurm.site_config import read_site

MOST_RUNS = 1000  # Slurm's MaxArraySize is 1001 by default


def main(argv: Sequence[str]) -> int:
    """Submit the combinations that are not finished, and list all. Raises ConfigError before anything is written."""
    parser = command_parser(__doc__)
    parser.add_argument("--max-parallel", type=int, metavar="N", help="how many run at once; left out, all")
    add_submission_flags(parser)
    args, rest = parser.parse_known_args(argv)
    if args.max_parallel is not None and args.max_parallel < 1:
        raise ConfigError(f"--max-parallel {args.max_parallel}: expected a number of runs from 1 on; left out, all")
    keys = [word for word in rest if re.fullmatch(r"\w+\.[\w-]+=.*", word)]
    overrides = [*(word for word in rest if word not in keys), *overrides_of(args)]
    site = read_site()
    options = options_of(args, site)
    combinations = [*_combinations(keys)]
    group = f"{Path(args.jobfile).stem}-{hashlib.sha256(' '.join(rest).encode()).hexdigest()[:6]}"
    configs = [load_job(args.jobfile, [*overrides, *words, "--tracking.group", group], site) for words in combinations]
    _check_array(configs)
    left = []
    for words, config in zip(combinations, configs, strict=True):
        state = _state(config)
        print(f"{config.run.name:<40} {' '.join(words)}{f'  ({state})' if state else ''}")
        if state is None:
            left.append(config)
    if not left:  # a sweep is started again until nothing is left
        return 0
    home = RunDir(absolute(run_dir_of(left[0]).path).parent / SWEEPS / group)
    sizes = left[0].resources
    job = plan_job(left[0], options, site, home, copied=not args.no_snapshot, parallel=args.max_parallel)
    executor = build_executor(job)
    runs = [RunDir(absolute(run_dir_of(config).path)) for config in left]
    text = script(executor, len(left))
    check_job(left[0], runs, options, site.run_root, text, dry_run=args.dry_run)
    if args.dry_run:
        print(text)
        return 0
    job_id = submit_runs(executor, job, left, runs, home)[0].job_id.partition("_")[0]
    print(f"submitted: job {job_id}, {len(left)} runs, {cost_ceiling(sizes, len(left))}")
    if sizes.note is not None:
        print(sizes.note)
    fnet, name = fnet_command(), group
    if home.path.parent.parent != absolute(run_root()):
        name = quoted(short_path(home.path))
    print(f"next: {fnet} status {name} --watch; to end all: {fnet} cancel {job_id}; to compare: {fnet} report {name}")
    return 0


def _combinations(keys: Sequence[str]) -> Iterator[list[str]]:
    """Yield every combination of values as --section.key VALUE. Raises ConfigError if there is none."""
    if not keys:
        raise ConfigError("nothing to sweep over: expected KEY=VALUE,VALUE, like optim.lr=0.001,0.003")
    names, values = zip(*(word.split("=", 1) for word in keys), strict=True)
    if len({*names}) < len(names):
        raise ConfigError(f"a key is swept over twice: {', '.join(names)}; give all its values at once")
    for combination in product(*(text.split(",") for text in values)):
        yield [word for name, value in zip(names, combination, strict=True) for word in (f"--{name}", value)]


def _state(config: Config) -> str | None:
    """Return why a run is not to be submitted: it is finished, or in a job; None if it is to be."""
    if (outcome := check_run(config)) is not None:
        return f"finished, {outcome['step']:,} steps"
    return next((f"{job.state.lower()}, job {job.job_id}" for job in queued_jobs(run_dir_of(config))), None)


def _check_array(configs: Sequence[Config]) -> None:
    """Raise ConfigError unless the configs are different runs of one size, and few enough for one array."""
    names = [config.run.name for config in configs]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{names.count(twice)} combinations are one run, {twice}; sweep over what changes the result")
    if any(config.resources != configs[0].resources for config in configs):
        raise ConfigError("the tasks of an array have one size; sweep over other settings than resources.*")
    if len(configs) > MOST_RUNS:
        raise ConfigError(f"{len(configs):,} combinations, expected at most {MOST_RUNS:,} in one array")
