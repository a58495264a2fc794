"""What `doctor` is asked, and the checks of this machine, or through a job those of nodes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from jobs.doctor import machine
from jobs.doctor import python_env as interpreter
from jobs.doctor import slurm_checks as controller
from jobs.doctor.allreduce_check import all_reduce
from jobs.doctor.node_job import check_nodes, script_of
from jobs.doctor.result import HERE, MISS, WARN, Check, show
from jobs.launcher.node_spec import NodeSpec, Topology
from jobs.runs import load_job
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from slurm import client
from slurm.errors import OptionError, SlurmError
from slurm.sbatch_options import Options
from slurm.site_config import Site, read_site

JOBFILE = str(CODE_ROOT / "jobs" / "node.toml")  # its settings of data, runs and tracking are the defaults
SHORT = {"--resources.time": "2", "--resources.signal-s": "10"}  # torch may come from a cold disk; nothing is to save
MOST_NODES = 16  # whose addresses are asked for from here


def examine(argv: Sequence[str], first: Sequence[Check]) -> int:
    """The checks after the `first`; 1 if something is MISS, else 0."""
    asked, overrides = _parser().parse_known_args(argv)
    sizes = overrides_of(asked)
    if not asked.cluster and (sizes or asked.dry_run):
        raise ConfigError("sizes of a job, and --dry-run, are for --cluster: add it, or leave them out")
    given = {word.partition("=")[0].replace("_", "-") for word in (*overrides, *sizes)}
    short = [word for name, text in SHORT.items() if name not in given for word in (name, text)]
    try:
        site = read_site()
    except OptionError as error:
        return show(
            {HERE: [*first, Check("site", MISS, str(error), "correct it, and run doctor again")]}, as_json=asked.json
        )
    config, options = load_job(JOBFILE, [*overrides, *sizes, *short], site), options_of(asked, site)
    if asked.dry_run:
        print(script_of(config, options, site, copied=not asked.no_snapshot))
        return 0
    of_slurm = _slurm(config, options, site)
    if not asked.cluster:
        seen = [_addresses()] if len(of_slurm) > 1 else []  # there is a cluster
        return show({HERE: [*first, *_here(config), *of_slurm, *seen]}, as_json=asked.json)
    if any(check.verdict == MISS for check in of_slurm):
        return show({HERE: of_slurm}, as_json=asked.json)
    nodes = check_nodes(config, options, site, copied=not asked.no_snapshot)
    return show({HERE: of_slurm, **nodes}, as_json=asked.json)


def _here(config: Config) -> list[Check]:
    """The checks of this machine."""
    answer = interpreter.ask_torch()
    checks = [
        interpreter.torch(answer),
        *machine.devices(answer),
        machine.data(config),
        machine.disk(Path(config.run.root).expanduser()),
        machine.wandb(config),
        machine.own_name(),
    ]
    gpus = len(answer.get("gpus", []))
    with TemporaryDirectory(prefix="doctor-") as place:
        node_spec, device = (
            (NodeSpec(Topology(1, 0, gpus)), "auto") if gpus > 1 else (NodeSpec(Topology(1, 0, 2)), "cpu")
        )
        return checks + all_reduce(node_spec, Path(place), device)


def _slurm(config: Config, options: Options, site: Site) -> list[Check]:
    """The checks of the cluster, as it is seen from here."""
    cluster = controller.ask_slurm()
    if isinstance(cluster, Check):
        return [cluster]
    return [
        controller.controller(cluster),
        controller.site(cluster),
        controller.partitions(cluster, options.partition),
        controller.preemption(cluster),
        controller.shared(Path(config.run.root).expanduser(), site.run_root),
    ]


def _addresses() -> Check:
    """Whether nodes have addresses, as it is seen from here."""
    try:
        return machine.node_names(client.node_names()[:MOST_NODES], WARN)
    except SlurmError as error:
        return Check("node names", WARN, str(error), "run doctor again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnet doctor",
        usage="fnet doctor [--cluster [-N NODES] [--gpus-per-node N] [-p PARTITION]] [--json] "
        "[--section.key VALUE ...]",
        description="Is this machine ready to train? With --cluster, are these nodes? A short job on them looks.",
        allow_abbrev=False,
    )
    add_submission_flags(parser)
    parser.add_argument("--cluster", action="store_true", help="check nodes, by a Slurm job")
    parser.add_argument("--json", action="store_true", help="print the checks as one JSON array")
    return parser
