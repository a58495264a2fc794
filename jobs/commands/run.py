"""fnet run JOBFILE: train on this machine, or under srun as one node of a job; restart after crashes (start and end 1)

After a crash, go on from the last checkpoint. Under srun with one task a node (slurm/train.sbatch), train this node's
ranks of the job. Each attempt has new processes and a new rendezvous, so that nothing is left of a rank that died.
"""

from collections.abc import Sequence
from dataclasses import replace

from fnet_dist.checkpoint.resume import check_run, starts_new_run
from fnet_dist.errors import ConfigError
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.sharing import other_owner
from jobs.launcher.node import run_node
from jobs.launcher.node_spec import NodeSpec, node_spec_in_job
from jobs.launcher.workers import chosen_interface, chosen_notify
from jobs.runs import check_control, command_parser, load_job
from slurm.job_env import read_allocation
from slurm.site_config import read_site


def main(argv: Sequence[str]) -> int:
    """Train the job file's run; return its exit code."""
    parser = command_parser(__doc__)
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="ranks on this node, or gpu: one for each")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes, each with its own `fnet run`")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    args, overrides = parser.parse_known_args(argv)
    allocation, site = read_allocation(), read_site()
    nproc_per_node = _ranks_here(args.nproc_per_node)
    config = load_job(args.jobfile, overrides, site)
    run = run_dir_of(config)
    if other_owner(run) is not None and not starts_new_run(config) and check_run(config) is None:
        check_control(run, site)
    interface = chosen_interface() or site.interface
    if allocation is None:
        node_spec = NodeSpec(args.nnodes, _node_rank(args.nnodes, args.node_rank), nproc_per_node, interface=interface)
    elif args.node_rank is not None or args.nnodes != 1:
        raise ConfigError("--nnodes and --node-rank come from Slurm in a job; leave them out")
    else:
        node_spec = node_spec_in_job(allocation, nproc_per_node, config.resources.warning_s, interface, None)
    if node_spec.nnodes > 1 and starts_new_run(config):
        raise ConfigError(
            "checkpoint.resume new or PATH on several nodes: the others would not know the new run's name; start it "
            "on one node first, give a new --run.name, or use `fnet submit`"
        )
    notify = chosen_notify()
    return run_node(config, replace(node_spec, notify=site.notify if notify is None else notify))


def _node_rank(nnodes: int, given: int | None) -> int:
    node_rank = 0 if nnodes == 1 and given is None else given
    if node_rank is None or not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"--node-rank {'not given' if node_rank is None else node_rank}, with --nnodes {nnodes}: expected this "
            f"node's number, 0 to {nnodes - 1}, another one on each"
        )
    return node_rank


def _ranks_here(text: str) -> int:
    if text == "gpu":
        import torch

        if torch.cuda.device_count() == 0:
            raise ConfigError("--nproc-per-node gpu: torch sees no GPU; give a number of ranks, or see nvidia-smi")
        return torch.cuda.device_count()
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--nproc-per-node {text}: expected a whole number from 1 on, or gpu")
    return int(text)
