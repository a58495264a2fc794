"""Every other node: join each attempt that node 0 begins, until one is the last."""

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.log import configure_logging
from fnet_dist.run.run_dir import run_dir_of
from fnet_dist.run.sharing import share_files
from fnet_dist.run.stop import STOPPED_EXIT_CODES, stop_reason
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import HeartbeatMonitor, check_connection, meeting_place, wait_for_attempt
from jobs.launcher.restart_policy import find_first_failure, report_failure
from jobs.launcher.workers import Worker, Workers


def follow(config: Config, node_spec: NodeSpec, workers: Workers) -> int:
    """Run this node's ranks of every attempt; return node 0's exit code.

    In a Slurm job return 0: node 0's task ends the job, and with --kill-on-bad-exit another one would kill it while it
    saves. Raises FnetError if node 0 begins no attempt, its heartbeat stops, or it cannot be reached.
    """
    run, job = run_dir_of(config), node_spec.allocation
    number, begun = 0, known.number if (known := last_attempt(run)) else 0
    this_start = None if job is None else (job.job_id, job.restart_count)
    while True:
        patience_s = 10 * config.parallel.timeout_s  # nodes are not started at the same moment
        attempt = wait_for_attempt(run, number, begun, patience_s, lambda: bool(workers.stop_signal), this_start)
        if attempt is None:
            return stop_reason(workers.stop_reason).exit_code if job is None else 0
        number, begin = attempt.number, attempt.read_begin()
        share_files(run.path)
        configure_logging(node_spec.process, number)
        if begin["world_size"] != node_spec.world_size or begin["address"] is None:
            raise ConfigError(
                f"node 0 runs {begin['world_size']} ranks on {begin.get('nnodes', 1)} nodes, this node expects "
                f"{node_spec.world_size} on {node_spec.nnodes}; give all nodes the same --nnodes and --nproc-per-node"
            )
        monitor, ended = HeartbeatMonitor(attempt), list[Worker]()
        check_connection(begin["address"], monitor.is_over)
        if not monitor.is_over():  # ranks started now would wait in the rendezvous for nothing
            with meeting_place(begin["address"], node_spec.interface) as meeting:
                workers.start(attempt, config, node_spec, meeting, None)
                ended = workers.watch(lambda: None, monitor.is_over)
                report_failure(attempt, find_first_failure(attempt, ended))
        monitor.wait()
        end = attempt.read_end()
        if end is not None and not end["restarts"]:
            return int(end["exit_code"]) if job is None else 0
        if workers.stop_signal:
            if job is None and not attempt.is_superseded:
                run.stop.touch()  # the signal reached this node alone
            return stop_reason(workers.stop_reason).exit_code if job is None else 0
        if job is not None and ended and all(worker.process.returncode in STOPPED_EXIT_CODES for worker in ended):
            return 0  # all ranks have agreed to stop; that node 0's heartbeat is late must not end its save
        if end is None and not attempt.is_superseded:
            raise FnetError(f"node 0 shows no heartbeat in {run.attempt(number)}; start all nodes again to go on")
