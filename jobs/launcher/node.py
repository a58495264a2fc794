"""Train a node's part of a run, attempt after attempt, until the run has ended."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fnet_dist.checkpoint.resume import check_run
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.config.schema import Config
from fnet_dist.config.slurm_resources import ResourcesConfig
from fnet_dist.run.attempt import HEARTBEAT_EVERY_S
from fnet_dist.run.console import final_table, next_commands, resume_command
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.stop import SIGNALS
from jobs.launcher.follower import follow
from jobs.launcher.leader import lead
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.requeue import requeue_or_exit
from jobs.launcher.workers import Workers, say
from slurm.job_env import Allocation, binding_gaps


def run_node(config: Config, node_spec: NodeSpec) -> int:
    """This node's part of a run, until it has ended; the exit code. Node 0 of a Slurm job settles with Slurm what
    becomes of the job."""
    ranks = Workers()
    with _handlers(ranks):
        if node_spec.allocation is not None:
            _die_with_the_step()
            _compare_bindings(node_spec.allocation, config.resources, node_spec.sizes.nproc_per_node)
        if check_run(config) is not None:
            run = run_dir_of(config)
            say(f"finished before, nothing is trained now: {run.path}\n{next_commands(run)}\n{final_table(run)}")
            return 0
        check_batch_split(config, node_spec.sizes.world_size)
        if node_spec.sizes.node_rank > 0:
            return follow(config, node_spec, ranks)
        decision = lead(config, node_spec, ranks)
        if node_spec.allocation is not None:
            return requeue_or_exit(node_spec.allocation, run_dir_of(config), config, decision, ranks)
        if decision.status == "stopped":
            alone = node_spec.sizes.nnodes == 1 and run_dir_of(config).config.exists()
            command = resume_command(run_dir_of(config), node_spec.sizes.nproc_per_node)
            say(f"to go on: {command if alone else 'the same command, on all nodes'}")
        return decision.exit_code


def _die_with_the_step() -> None:
    """From here on this process ends when slurmstepd, its parent, has gone, and its ranks with it: Slurm would not.

    The kernel's signal for that (prctl(2)) comes at the end of the thread that forked, not of its process.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(HEARTBEAT_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="slurmstepd", daemon=True).start()


def _compare_bindings(allocation: Allocation, resources: ResourcesConfig, nproc_per_node: int) -> None:
    """Say loudly where Slurm has bound this task to less than its ranks were to have."""
    for gap in binding_gaps(allocation, resources.cpus_per_rank * nproc_per_node, resources.gpus_per_node):
        say(f"WARNING: {gap}")


@contextmanager
def _handlers(ranks: Workers) -> Iterator[None]:
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
