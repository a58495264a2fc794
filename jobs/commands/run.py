"""python -m jobs run JOBFILE: train on this machine, attempt after attempt, until the run has ended.

Each attempt is a fresh set of processes that meet in a fresh place: what a dead rank left behind is never met again.
Restarts belong here and not to torchrun, whose store survives them (fnet_dist/README.md). Under srun, one task a node,
it does this node's part of the job.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fnet_dist.checkpoint.resume import STARTS_ANEW, check_run, source_of
from fnet_dist.config.batch_split import check_sharing
from fnet_dist.config.help import settings_help
from fnet_dist.config.schema import Config
from fnet_dist.config.slurm_resources import ResourcesConfig
from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import ALIVE_EVERY_S
from fnet_dist.run.console import final_table, how_to_go_on, resume_command
from fnet_dist.run.run_dir import run_of
from fnet_dist.run.stop import SIGNALS
from jobs.launcher.follower import follow
from jobs.launcher.leader import lead
from jobs.launcher.node_spec import Part, Sizes, part_in_job
from jobs.launcher.requeue import settle
from jobs.launcher.workers import Ranks, chosen_interface, say
from jobs.runs import load_job
from slurm.job_env import Allocation, binding_gaps, read_allocation
from slurm.site_config import read_site


def main(argv: Sequence[str]) -> int:
    """Run the job file that argv names, and return the run's exit code."""
    if {"-h", "--help"} & set(argv):
        print(_parser().format_help() + "\n" + settings_help())
        return 0
    asked, overrides = _parser().parse_known_args(argv)
    allocation, site = read_allocation(), read_site()
    nproc_per_node = _ranks_here(asked.nproc_per_node)
    config = load_job(asked.jobfile, overrides, site)
    interface = chosen_interface() or site.interface
    if allocation is None:
        part = Part(Sizes(asked.nnodes, _node_rank(asked), nproc_per_node), interface=interface)
    elif asked.node_rank is not None or asked.nnodes != 1:
        raise ConfigError("--nnodes and --node-rank are Slurm's to say in a job; leave them out")
    else:
        part = part_in_job(allocation, nproc_per_node, config.resources.signal_s, interface, None)
    if part.sizes.nnodes > 1 and (config.checkpoint.resume == STARTS_ANEW or source_of(config) is not None):
        raise ConfigError(
            "checkpoint.resume never or PATH on several nodes: the others would not know the new run's name; start it "
            "on one node first, give a new --run.name, or use `python -m jobs submit`"
        )
    return run_part(config, part)


def run_part(config: Config, part: Part) -> int:
    """This node's part of a run, until it has ended; the exit code. Node 0 of a Slurm job settles with Slurm what
    becomes of the job."""
    ranks = Ranks()
    with _handlers(ranks):
        if part.allocation is not None:
            _die_with_the_step()
            _compare_bindings(part.allocation, config.resources, part.sizes.nproc_per_node)
        if check_run(config) is not None:
            run = run_of(config)
            say(f"finished before, nothing is trained now: {run.path}\n{how_to_go_on(run)}\n{final_table(run)}")
            return 0
        check_sharing(config, part.sizes.world_size)
        if part.sizes.node_rank > 0:
            return follow(config, part, ranks)
        verdict = lead(config, part, ranks)
        if part.allocation is not None:
            return settle(part.allocation, run_of(config), config, verdict, ranks)
        if verdict.status == "stopped":
            alone = part.sizes.nnodes == 1 and run_of(config).config.exists()
            command = resume_command(run_of(config), part.sizes.nproc_per_node)
            say(f"to go on: {command if alone else 'the same command, on all nodes'}")
        return verdict.exit_code


def _die_with_the_step() -> None:
    """From here on this process ends when slurmstepd, its parent, has gone, and its ranks with it: Slurm would not.

    The kernel's signal for that (prctl(2)) comes at the end of the thread that forked, not of its process.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ALIVE_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="slurmstepd", daemon=True).start()


def _compare_bindings(allocation: Allocation, resources: ResourcesConfig, nproc_per_node: int) -> None:
    """Say loudly where Slurm has bound this task to less than its ranks were to have."""
    for gap in binding_gaps(allocation, resources.cpus_per_rank * nproc_per_node, resources.gpus_per_node):
        say(f"WARNING: {gap}")


@contextmanager
def _handlers(ranks: Ranks) -> Iterator[None]:
    before = {number: signal.signal(number, ranks.pass_on) for number in SIGNALS}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup: a terminal that goes asks for a stop
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda number, frame: ranks.pass_on(signal.SIGTERM, frame))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # in a job they are blocked until somebody listens
    try:
        yield
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _node_rank(asked: argparse.Namespace) -> int:
    node_rank = 0 if asked.nnodes == 1 and asked.node_rank is None else asked.node_rank
    if node_rank is None or not 0 <= node_rank < asked.nnodes:
        raise ConfigError(
            f"--node-rank {'not given' if node_rank is None else node_rank}, with --nnodes {asked.nnodes}: expected "
            f"this node's number, 0 to {asked.nnodes - 1}, another one on each"
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
        prog="python -m jobs run",
        usage="python -m jobs run JOBFILE [--nproc-per-node N] [--nnodes N --node-rank R] [--section.key VALUE ...]",
        description="Train on this machine; after a crash, go on from the last checkpoint. Under srun with one task a "
        "node (slurm/train.sbatch), this node's part of the job.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file, or a run's config.json")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="ranks on this node, or gpu: one for each")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes, each with its own `jobs run`")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    return parser
