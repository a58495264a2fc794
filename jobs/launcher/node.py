"""Train this node's ranks of a run, attempt after attempt, until the run has ended."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fnet_dist.checkpoint.resume import check_run, finished_note
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.config.schema import Config
from fnet_dist.run.attempt import HEARTBEAT_EVERY_S
from fnet_dist.run.console import final_table, resume_command
from fnet_dist.run.log import LOGGER, configure_logging, write
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.stop import SIGNALS, stop_handlers
from jobs.launcher.follower import follow
from jobs.launcher.leader import lead
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.notifier import Notifier
from jobs.launcher.requeue import requeue_if_needed
from jobs.launcher.workers import Workers
from slurm.job_env import binding_gaps, has_lost_slurmstepd, parent_of, task_process


def run_node(config: Config, node_spec: NodeSpec) -> int:
    """Run this node's part of a run to its end; return the exit code. Node 0 of a Slurm job may ask for a requeue."""
    job = node_spec.allocation
    workers = Workers(in_job=job is not None)
    configure_logging(node_spec.process)
    with signal_handlers(workers):
        if job is not None:
            exit_with_slurmstepd()
            asked = config.resources.cpus_per_rank * node_spec.nproc_per_node
            cpus = max(asked, job.cpus_per_task)  # train.sbatch gives the job's, which no setting says
            for gap in binding_gaps(job, cpus, config.resources.gpus_per_node):
                LOGGER.warning(gap)
        run = run_dir_of(config)
        if check_run(config) is not None:  # a finished run starts no process and asks for no GPU
            LOGGER.info(finished_note(config))
            write(f"{final_table(run)}\n", sys.stdout)
            return 0
        check_batch_split(config, node_spec.world_size)
        if node_spec.node_rank > 0:
            return follow(config, node_spec, workers)
        with Notifier(node_spec.notify) as notifier:
            decision = lead(config, node_spec, workers, notifier)
            if job is not None:
                return requeue_if_needed(job, run, config, decision, workers, notifier, node_spec.ask_slurm)
            notifier.send(decision)
        if decision.status == "stopped":
            alone = node_spec.nnodes == 1 and run.config.exists()
            command = resume_command(run, node_spec.nproc_per_node) if alone else "the same command, on all nodes"
            LOGGER.info(f"to go on: {command}")
        return decision.exit_code


def exit_with_slurmstepd() -> None:
    """Let this process, and its ranks with it, end when the task's slurmstepd is gone. Slurm would let it run on.

    It also ends with its parent, which is another process in a container.
    """
    # Not by PR_SET_PDEATHSIG (prctl(2)): that fires at the end of the thread that forked, not of its process.
    task = task_process()
    parent, slurmstepd = os.getppid(), parent_of(task)
    lost = has_lost_slurmstepd(task)  # while Python started, for two seconds

    def watch() -> None:
        misses = 0
        while os.getppid() == parent and misses < 2 and not lost:  # /proc may be unreadable for a moment
            misses = 0 if parent_of(task) == slurmstepd else misses + 1
            time.sleep(HEARTBEAT_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="slurmstepd", daemon=True).start()


@contextmanager
def signal_handlers(workers: Workers) -> Iterator[None]:
    """Forward signals to `workers` inside; kill what still runs at the end.

    In a Slurm job, block signals from then on: the default of a late warning would end the process of a run that has
    finished, and its job would have failed.
    """
    handlers = stop_handlers(workers.forward_signal)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # sbatch and train.sbatch start us with them blocked
    try:
        yield
    finally:
        workers.close()
        if workers.in_job:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)
