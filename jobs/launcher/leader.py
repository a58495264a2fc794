"""What node 0 does of a run: attempt after attempt, until the run has ended."""

import socket
import sys
import time
from contextlib import closing, nullcontext
from typing import Any

from fnet_dist.checkpoint.resume import claim_run
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import Runtime
from fnet_dist.run.attempt import Attempt, Progress, end_attempt, kept_alive, last_attempt
from fnet_dist.run.run_dir import read_json, read_outcome, run_of
from fnet_dist.run.stop import AskedToStop
from jobs.launcher.node_spec import Part
from jobs.launcher.rendezvous import meeting_place, open_door
from jobs.launcher.restart_policy import Cause, Verdict, failed_elsewhere, find_cause, judge, tell_cause
from jobs.launcher.workers import Follower, Ranks, say

MEETING_S = 20.0  # from a signal on, for ranks that have not met yet


def lead(config: Config, part: Part, ranks: Ranks) -> Verdict:
    """Claim an attempt, run it, judge it; again if that may help. How the run stands in the end."""
    sizes = part.sizes
    while True:
        with closing(open_door(part.interface, part.peer)) if sizes.nnodes > 1 else nullcontext() as door:
            address = None if door is None else "{}:{}".format(*door.getsockname())
            before = _last_code(config)
            try:
                config, attempt = claim_run(config, Runtime(), lambda: ranks.reason, **_begin(part), address=address)
            except AskedToStop:
                return Verdict("stopped", ranks.reason, ranks.exit_code, 0)
            ranks_there = f"{sizes.world_size} rank{'s' * (sizes.world_size > 1)}"
            where = "" if address is None else f" on {sizes.nnodes} nodes, which meet at {address}"
            say(f"attempt {attempt.number} of {attempt.run.path}: {ranks_there}{where}; Ctrl-C saves and stops")
            if part.code is not None and before not in (None, part.code.name):
                say(f"WARNING: the code has changed: {part.code.name} runs now, {before} ran before")
            cause = _train(attempt, config, part, ranks, address, door)
        if attempt.is_superseded:
            raise attempt.lost()
        tell_cause(attempt, cause)
        verdict = judge(attempt, cause, ranks, config.parallel.max_restarts)
        if verdict.words:
            say(verdict.words, sys.stderr)
        if not verdict.restarts:
            _end(attempt, verdict)
            return verdict
        end_attempt(attempt, verdict.reason, verdict.step, verdict.exit_code, restarts=True)


def _begin(part: Part) -> dict[str, Any]:
    """What begin.json says of this part."""
    job = part.allocation
    return {
        "world_size": part.sizes.world_size,
        "nnodes": part.sizes.nnodes,
        "nodes": None if job is None else job.node_list,
        "slurm_job_id": None if job is None else job.job_id,
        "slurm_restart_count": None if job is None else job.restart_count,
        "code": None if part.code is None else part.code.name,
    }


def _last_code(config: Config) -> str | None:
    """The snapshot that the last attempt ran, if it ran one."""
    last = last_attempt(run_of(config))
    code: str | None = None if last is None else read_json(last.begin).get("code")
    return code


def _train(
    attempt: Attempt, config: Config, part: Part, ranks: Ranks, address: str | None, door: socket.socket | None
) -> Cause | None:
    """Node 0's ranks of `attempt`, from start to end; why it failed, if it did."""
    with kept_alive(attempt), meeting_place(address, part.interface) as meeting:
        ranks.start(attempt, config, part, meeting, None if door is None else door.fileno())
        log = Follower(attempt.log(0))

        def is_over() -> bool:
            # A rank that waits for others to come sees no signal; it has trained nothing that could be lost.
            in_vain = log.is_empty and time.monotonic() - ranks.asked_at > MEETING_S
            # Nor does it see that one of them has gone.
            lost = failed_elsewhere(attempt, range(part.sizes.nproc_per_node)) if part.sizes.nnodes > 1 else None
            if lost is not None and log.is_empty:
                say(lost, sys.stderr)
            return in_vain or attempt.is_superseded or lost is not None

        return find_cause(attempt, ranks.watch(log.show, is_over))


def _end(attempt: Attempt, verdict: Verdict) -> None:
    """The attempt was the run's last for now: end.json, and outcome.json where rank 0 has not written what counts."""
    outcome = read_outcome(attempt.run)
    if outcome is not None and outcome["status"] == verdict.status and outcome["reason"] == verdict.reason:
        end_attempt(attempt, verdict.reason, verdict.step, verdict.exit_code)
    else:
        progress = Progress(attempt, step=verdict.step)
        if outcome is not None:
            progress.epoch, progress.test_accuracy = outcome["epoch"], outcome["test_accuracy"]
        progress.end(verdict.status, verdict.reason, verdict.exit_code)
