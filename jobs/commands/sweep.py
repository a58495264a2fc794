"""fnet sweep JOBFILE K=V,V ...: one Slurm array, a run for each combination of values, or --sample N (start and end 3)

Started again, it submits those that are not finished. The sweep has a name, which `fnet status` and `fnet report` take.
With --sample N, runs are drawn: of K=A:B uniformly, of K=log:A:B uniformly in the logarithm, of K=V,V one value.
"""

import argparse
import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fnet_dist.checkpoint.resume import check_run
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.config.load import settings_class
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute, quoted
from fnet_dist.run.console import fnet_command, short_path
from fnet_dist.run.run_dir import SWEEPS, RunDir, read_json, run_dir_of, write_json
from jobs.runs import check_control, command_parser, load_job, run_root
from jobs.submission.combinations import combinations, sample
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from jobs.submission.preflight import check_job, jobs_that_train, print_expected_start
from jobs.submission.sbatch import build_executor, cost_ceiling, script
from jobs.submission.submit import plan_job, submit_runs
from slurm.site_config import read_site

MOST_TASKS = 1000  # Slurm's MaxArraySize is 1001 by default


def main(argv: Sequence[str]) -> int:
    """Submit the runs that are not finished, and list all. Raises ConfigError before anything is written."""
    args, rest = _parse(argv)
    keys = [word for word in rest if re.fullmatch(r"\w+\.[\w-]+=.*", word)]
    overrides = [*(word for word in rest if word not in keys), *overrides_of(args)]
    site = read_site()
    options, kind = options_of(args, site), settings_class([args.jobfile, *overrides])
    cells = combinations(keys, kind) if args.sample is None else sample(keys, kind, args.sample, args.seed)
    # --sample does not count in the name: a larger number adds runs to the same sweep.
    identity = [*rest, *(["--seed", str(args.seed)] if args.seed else [])]
    group = f"{Path(args.jobfile).stem}-{hashlib.sha256(' '.join(identity).encode()).hexdigest()[:6]}"
    configs = [load_job(args.jobfile, [*overrides, *words, "--tracking.group", group], site) for words in cells]
    _check_array(configs, args.pack)
    left = _list_runs(configs, cells)
    home, fnet, name = RunDir(absolute(run_dir_of(configs[0]).path).parent / SWEEPS / group), fnet_command(), group
    if home.path.parent.parent != absolute(run_root()):
        name = quoted(short_path(home.path))
    if not left:  # a sweep is started again until nothing is left
        print(f"nothing to submit; to compare: {fnet} report {name}" if home.path.exists() else "nothing to submit")
        return 0
    tasks = -(-len(left) // args.pack)
    pack = -(-len(left) // tasks)  # five runs by --pack 4 are three and two: less stands idle than with four and one
    whole = left[0].model_copy(update={"resources": left[0].resources.side_by_side(pack)})  # what a task asks for
    job = plan_job(whole, options, site, home, copied=not args.no_snapshot, parallel=args.max_parallel)
    executor = build_executor(job)
    runs = [RunDir(absolute(run_dir_of(config).path)) for config in left]
    for run in runs:
        check_control(run, site)
    text = script(executor, tasks)
    check_job(whole, runs, options, site.run_root, text, dry_run=args.dry_run)
    if args.dry_run:
        print(text)
        print_expected_start(text, options)
        return 0
    job_id = submit_runs(executor, job, left, runs, home, pack)[0].job_id.partition("_")[0]
    values = (read_json(home.sweep) or {"runs": {}})["runs"]  # a smaller --sample does not forget the others
    values |= {config.run.name: " ".join(words) for config, words in zip(configs, cells, strict=True)}
    command = shlex.join([fnet, "sweep", *argv])
    write_json(home.sweep, {"command": command, "seed": args.seed if args.sample else None, "runs": values})
    packed = f" in {tasks} tasks of up to {pack}" if pack > 1 else ""
    print(f"submitted: job {job_id}, {len(left)} runs{packed}, {cost_ceiling(whole.resources, tasks)}")
    if whole.resources.note is not None:
        print(whole.resources.note)
    print(f"next: {fnet} status {name} --watch; to end all: {fnet} cancel {job_id}; to compare: {fnet} report {name}")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the keys and settings. Raises ConfigError for numbers that make no sense."""
    parser = command_parser(__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="draw N runs; more later add to the same sweep")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (0); run.seed is the runs' own")
    parser.add_argument("--pack", type=int, default=1, metavar="K", help="run K runs side by side in an array task (1)")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="how many array tasks at once; left out, all")
    add_submission_flags(parser)
    args, rest = parser.parse_known_args(argv)
    for flag in ("sample", "pack", "max_parallel"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {number}: expected a whole number from 1 on")
    if args.seed and args.sample is None:
        raise ConfigError("--seed is that of a draw: give --sample N with it, or sweep over run.seed=0,1")
    return args, rest


def _list_runs(configs: Sequence[Config], cells: Sequence[Sequence[str]]) -> list[Config]:
    """Print all runs; return those that are to be submitted."""
    left = []
    for config, words in zip(configs, cells, strict=True):
        state = _state(config)
        print(f"{config.run.name:<40} {' '.join(words)}{f'  ({state})' if state else ''}")
        if state is None:
            left.append(config)
    return left


def _state(config: Config) -> str | None:
    """Return why a run is not to be submitted: it is finished, or in a job; None if it is to be."""
    if (outcome := check_run(config)) is not None:
        return f"finished, {outcome['step']:,} steps"
    return next((f"{job.state.lower()}, job {job.job_id}" for job in jobs_that_train(run_dir_of(config))), None)


def _check_array(configs: Sequence[Config], pack: int) -> None:
    """Raise ConfigError unless the configs are different runs of one size, each can train, and one array holds them."""
    names, sizes = [config.run.name for config in configs], configs[0].resources
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{names.count(twice)} combinations are one run, {twice}; sweep over what changes the result")
    if any(config.resources != sizes for config in configs):
        raise ConfigError("the tasks of an array have one size; sweep over other settings than resources.*")
    if pack > 1 and sizes.nodes > 1:
        raise ConfigError(f"--pack {pack}: runs share one node, and resources.nodes is {sizes.nodes}; leave one out")
    if -(-len(configs) // pack) > MOST_TASKS:
        raise ConfigError(f"{len(configs):,} runs, expected at most {MOST_TASKS * pack:,} in one array")
    for config in configs:
        check_batch_split(config, sizes.nodes * sizes.ranks_per_node)
