"""fnet run JOBFILE: train on this machine, or under srun as one node of the job; restart after crashes (start and end)

Each attempt has new processes and a new rendezvous, so that nothing is left of a rank that died. torchrun does not
restart ranks for that reason: its store survives a restart (fnet_dist/README.md).
"""

import argparse
from collections.abc import Sequence

from fnet_dist.checkpoint.resume import starts_new_run
from fnet_dist.config.help import settings_help
from fnet_dist.errors import ConfigError
from jobs.launcher.node import run_node
from jobs.launcher.node_spec import NodeSpec, Topology, node_spec_in_job
from jobs.launcher.workers import chosen_interface
from jobs.runs import load_job
from slurm.job_env import read_allocation
from slurm.site_config import read_site


def main(argv: Sequence[str]) -> int:
    """Train the job file's run; return its exit code."""
    if {"-h", "--help"} & set(argv):
        print(_parser().format_help() + "\n" + settings_help())
        return 0
    args, overrides = _parser().parse_known_args(argv)
    allocation, site = read_allocation(), read_site()
    nproc_per_node = _ranks_here(args.nproc_per_node)
    config = load_job(args.jobfile, overrides, site)
    interface = chosen_interface() or site.interface
    if allocation is None:
        node_spec = NodeSpec(Topology(args.nnodes, _node_rank(args), nproc_per_node), interface=interface)
    elif args.node_rank is not None or args.nnodes != 1:
        raise ConfigError("--nnodes and --node-rank come from Slurm in a job; leave them out")
    else:
        node_spec = node_spec_in_job(allocation, nproc_per_node, config.resources.signal_s, interface, None)
    if node_spec.sizes.nnodes > 1 and starts_new_run(config):
        raise ConfigError(
            "checkpoint.resume new or PATH on several nodes: the others would not know the new run's name; start it "
            "on one node first, give a new --run.name, or use `fnet submit`"
        )
    return run_node(config, node_spec)


def _node_rank(args: argparse.Namespace) -> int:
    node_rank = 0 if args.nnodes == 1 and args.node_rank is None else args.node_rank
    if node_rank is None or not 0 <= node_rank < args.nnodes:
        raise ConfigError(
            f"--node-rank {'not given' if node_rank is None else node_rank}, with --nnodes {args.nnodes}: expected "
            f"this node's number, 0 to {args.nnodes - 1}, another one on each"
        )
    return int(node_rank)


def _ranks_here(text: str) -> int:
    if text == "gpu":
        import torch

        if torch.cuda.device_count() == 0:
            raise ConfigError("--nproc-per-node gpu: torch sees no GPU; give a number of ranks, or see nvidia-smi")
        return torch.cuda.device_count()
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--nproc-per-node {text}: expected a whole number from 1 on, or gpu")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnet run",
        usage="fnet run JOBFILE [--nproc-per-node N] [--nnodes N --node-rank R] [--section.key VALUE ...]",
        description="Train on this machine; after a crash, go on from the last checkpoint. Under srun with one task a "
        "node (slurm/train.sbatch), train this node's ranks of the job.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file, or a run's config.json")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="ranks on this node, or gpu: one for each")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes, each with its own `fnet run`")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    return parser
