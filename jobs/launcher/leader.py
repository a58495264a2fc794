"""What node 0 does of a run: attempt after attempt, until the run has ended."""

import socket
import sys
import time
from contextlib import closing, nullcontext
from typing import Any

from fnet_dist.checkpoint.resume import start_attempt
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.run.attempt import Attempt, heartbeat_thread, last_attempt
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt, read_outcome
from fnet_dist.run.run_dir import read_json, run_dir_of
from fnet_dist.run.stop import StopRequested
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.rendezvous import meeting_place, open_listening_socket
from jobs.launcher.restart_policy import (
    RankFailure,
    RestartDecision,
    decide_restart,
    failed_elsewhere,
    find_first_failure,
    report_failure,
)
from jobs.launcher.workers import Follower, Workers, say

MEETING_S = 20.0  # from a signal on, for ranks that have not met yet


def lead(config: Config, node_spec: NodeSpec, ranks: Workers) -> RestartDecision:
    """Claim an attempt, run it, judge it; again if that may help. How the run stands in the end."""
    sizes = node_spec.sizes
    while True:
        with (
            closing(open_listening_socket(node_spec.interface, node_spec.peer))
            if sizes.nnodes > 1
            else nullcontext() as door
        ):
            address = None if door is None else "{}:{}".format(*door.getsockname())
            before = _last_code(config)
            try:
                config, attempt = start_attempt(
                    config, LaunchEnv(), lambda: ranks.reason, **_begin(node_spec), address=address
                )
            except StopRequested:
                return RestartDecision("stopped", ranks.reason, ranks.exit_code, 0)
            ranks_there = f"{sizes.world_size} rank{'s' * (sizes.world_size > 1)}"
            where = "" if address is None else f" on {sizes.nnodes} nodes, which meet at {address}"
            say(f"attempt {attempt.number} of {attempt.run.path}: {ranks_there}{where}; Ctrl-C saves and stops")
            if node_spec.code is not None and before not in (None, node_spec.code.name):
                say(f"WARNING: the code has changed: {node_spec.code.name} runs now, {before} ran before")
            cause = _train(attempt, config, node_spec, ranks, address, door)
        if attempt.is_superseded:
            raise attempt.lost_ownership_error()
        report_failure(attempt, cause)
        decision = decide_restart(attempt, cause, ranks, config.parallel.max_restarts)
        if decision.words:
            say(decision.words, sys.stderr)
        if not decision.restarts:
            _end(attempt, decision)
            return decision
        end_attempt(attempt, decision.reason, decision.step, decision.exit_code, restarts=True)


def _begin(node_spec: NodeSpec) -> dict[str, Any]:
    """What begin.json says of this part."""
    job = node_spec.allocation
    return {
        "world_size": node_spec.sizes.world_size,
        "nnodes": node_spec.sizes.nnodes,
        "nodes": None if job is None else job.node_list,
        "slurm_job_id": None if job is None else job.job_id,
        "slurm_restart_count": None if job is None else job.restart_count,
        "code": None if node_spec.code is None else node_spec.code.name,
    }


def _last_code(config: Config) -> str | None:
    """The snapshot that the last attempt ran, if it ran one."""
    last = last_attempt(run_dir_of(config))
    code: str | None = None if last is None else read_json(last.begin).get("code")
    return code


def _train(
    attempt: Attempt,
    config: Config,
    node_spec: NodeSpec,
    ranks: Workers,
    address: str | None,
    door: socket.socket | None,
) -> RankFailure | None:
    """Node 0's ranks of `attempt`, from start to end; why it failed, if it did."""
    with heartbeat_thread(attempt), meeting_place(address, node_spec.interface) as meeting:
        ranks.start(attempt, config, node_spec, meeting, None if door is None else door.fileno())
        log = Follower(attempt.log(0))

        def is_over() -> bool:
            # A rank that waits for others to come sees no signal; it has trained nothing that could be lost.
            in_vain = log.is_empty and time.monotonic() - ranks.asked_at > MEETING_S
            # Nor does it see that one of them has gone.
            lost = (
                failed_elsewhere(attempt, range(node_spec.sizes.nproc_per_node)) if node_spec.sizes.nnodes > 1 else None
            )
            if lost is not None and log.is_empty:
                say(lost, sys.stderr)
            return in_vain or attempt.is_superseded or lost is not None

        return find_first_failure(attempt, ranks.watch(log.show, is_over))


def _end(attempt: Attempt, decision: RestartDecision) -> None:
    """The attempt was the run's last for now: end.json, and outcome.json where rank 0 has not written what counts."""
    outcome = read_outcome(attempt.run)
    if outcome is not None and outcome["status"] == decision.status and outcome["reason"] == decision.reason:
        end_attempt(attempt, decision.reason, decision.step, decision.exit_code)
    else:
        progress = RunOutcomeWriter(attempt, step=decision.step)
        if outcome is not None:
            progress.epoch, progress.test_accuracy = outcome["epoch"], outcome["test_accuracy"]
        progress.end(decision.status, decision.reason, decision.exit_code)
