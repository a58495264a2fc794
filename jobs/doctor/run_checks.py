"""Parse doctor's command line and run its checks: of this machine, or of nodes through a Slurm job."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from jobs.doctor import machine
from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.node_job import check_nodes, dry_run
from jobs.doctor.result import HERE, MISS, Check, Reports, has_miss, show
from jobs.doctor.slurm_checks import check_slurm
from jobs.launcher.node_spec import NodeSpec
from jobs.runs import command_parser, load_job, with_defaults
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from slurm.errors import OptionError
from slurm.site_config import read_site

USAGE = "fnet doctor [--cluster [-N NODES] [--gpus-per-node N] [-p PARTITION]] [--json] [--section.key VALUE]..."
JOBFILE = str(CODE_ROOT / "jobs" / "node.toml")  # its settings of data, runs and tracking are the defaults
# Minutes and seconds: torch may come from a cold disk, and there is no checkpoint to save.
DEFAULTS = {"--resources.time": "2", "--resources.signal-s": "10"}


def run_checks(argv: Sequence[str], first: Sequence[Check], doc: str) -> int:
    """Run the checks that argv asks for and show them after those in `first`. Return 1 if a check is MISS, else 0.

    `doc` is the command's docstring, of which its help is made.
    """
    parser = command_parser(doc, usage=USAGE, allow_abbrev=False)
    add_submission_flags(parser)
    parser.add_argument("--cluster", action="store_true", help="check nodes, by a Slurm job")
    parser.add_argument("--json", action="store_true", help="print the checks as one JSON array")
    args, overrides = parser.parse_known_args(argv)
    sizes = overrides_of(args)
    if not args.cluster and (sizes or args.dry_run):
        raise ConfigError("sizes of a job, and --dry-run, are for --cluster: add it, or leave them out")
    try:
        site = read_site()
    except OptionError as error:
        broken = Check("site", MISS, str(error), "correct it, and run doctor again")
        return show({HERE: [*first, broken]}, as_json=args.json)
    config = load_job(JOBFILE, with_defaults([*overrides, *sizes], DEFAULTS), site)
    options = options_of(args, site)
    if args.dry_run:
        print(dry_run(config, options, site, copied=not args.no_snapshot))
        return 0
    slurm = check_slurm(config, options, site, resolve_nodes=not args.cluster)  # with --cluster each node does so
    if not args.cluster:
        checks, gpus = machine.check_machine(config)
        with TemporaryDirectory(prefix="doctor-") as folder:
            ranks = all_reduce(NodeSpec(1, 0, gpus), Path(folder))
        return show({HERE: [*first, *checks, machine.own_name(), *ranks, *slurm]}, as_json=args.json)
    here: Reports = {HERE: slurm}
    nodes = {} if has_miss(here) else check_nodes(config, options, site, copied=not args.no_snapshot)
    return show({**here, **nodes}, as_json=args.json)
