"""What the other nodes do of a run: join each attempt that node 0 begins, until one says that it was the last."""

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import read_json, run_dir_of
from fnet_dist.run.stop import STOPPED_EXIT_CODES
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import HeartbeatMonitor, check_connection, meeting_place, wait_for_attempt
from jobs.launcher.restart_policy import find_first_failure, report_failure
from jobs.launcher.workers import Worker, Workers


def follow(config: Config, node_spec: NodeSpec, ranks: Workers) -> int:
    """Run this node's ranks of every attempt. The exit code: node 0's, but 0 in a Slurm job, where node 0 speaks for
    all nodes and another one's would make srun kill it while it saves.

    Raises FnetError if node 0 begins nothing, shows no life, or cannot be reached.
    """
    run, known, sizes, job = run_dir_of(config), last_attempt(run_dir_of(config)), node_spec.sizes, node_spec.allocation
    number, begun = 0, known.number if known else 0
    mine = None if job is None else (job.job_id, job.restart_count)
    while True:
        patience_s = 10 * config.parallel.timeout_s
        attempt = wait_for_attempt(run, number, begun, patience_s, lambda: bool(ranks.asked), mine)
        if attempt is None:
            return ranks.exit_code if job is None else 0
        number, begin = attempt.number, read_json(attempt.begin)
        if begin["world_size"] != sizes.world_size or begin["address"] is None:
            raise ConfigError(
                f"node 0 runs {begin['world_size']} ranks on {begin.get('nnodes', 1)} nodes, this node was told "
                f"{sizes.world_size} on {sizes.nnodes}; give all nodes the same --nnodes and --nproc-per-node"
            )
        pulse, ended = HeartbeatMonitor(attempt), list[Worker]()
        check_connection(begin["address"], pulse.is_over)
        if not pulse.is_over():
            with meeting_place(begin["address"], node_spec.interface) as meeting:
                ranks.start(attempt, config, node_spec, meeting, None)
                ended = ranks.watch(lambda: None, pulse.is_over)
                report_failure(attempt, find_first_failure(attempt, ended))
        end = pulse.wait_for_end()
        if end is not None and not end["restarts"]:
            return int(end["exit_code"]) if job is None else 0
        if ranks.asked:
            if job is None and not attempt.is_superseded:
                run.stop.touch()  # node 0 has not heard of it
            return ranks.exit_code if job is None else 0
        if job is not None and ended and all(rank.process.returncode in STOPPED_EXIT_CODES for rank in ended):
            return 0  # all have agreed to stop; that node 0's sign of life is late must not end its save
        if end is None and not attempt.is_superseded:
            raise FnetError(f"node 0 shows no life in {run.attempt(number)}; start all nodes again to go on")
