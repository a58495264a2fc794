"""Node 0: claim each attempt of the run, run this node's ranks of it, and decide whether another one follows."""

import logging
import signal
import socket
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from typing import Any

from fnet_dist.checkpoint.resume import choose_run, start_attempt
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.run.attempt import Attempt, heartbeat_thread, last_attempt
from fnet_dist.run.failure import REPLAYED, RankFailure, first_failure, read_failures
from fnet_dist.run.log import LOGGER, configure_logging, write
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt, read_outcome
from fnet_dist.run.stop import StopRequested, stop_reason
from fnet_dist.run.tail import FileTail
from jobs.launcher.bad_nodes import excluded_nodes, failures_by_bad_node
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.notifier import Notifier
from jobs.launcher.rendezvous import LOOK_EVERY_S, meeting_place, open_listening_socket
from jobs.launcher.repeated_steps import RepeatedSteps, steps_to_repeat
from jobs.launcher.requeue import requeue_instead
from jobs.launcher.restart_policy import (
    RestartDecision,
    decide_restart,
    describe_cause,
    describe_failure,
    find_cause,
    find_cause_of_hang,
    find_first_failure,
    report_failure,
)
from jobs.launcher.workers import Workers
from jobs.text import describe_nodes

OTHER_NODES_S = 2.0  # to learn from another node which of its ranks has failed
MEETING_S = 20.0  # after a signal, for ranks that are not connected yet: torch's rendezvous runs no signal handler


def lead(config: Config, node_spec: NodeSpec, workers: Workers, notifier: Notifier) -> RestartDecision:
    """Run attempt after attempt until the run has ended or another attempt would not help; return its state then."""
    while True:
        # A new socket for each attempt: a process that is left of the last one connects to nothing.
        with (
            closing(open_listening_socket(node_spec.interface, node_spec.peer))
            if node_spec.nnodes > 1
            else nullcontext() as listener
        ):
            try:
                config, attempt, repeated = _begin(config, node_spec, workers, listener)
            except StopRequested as stop:
                return RestartDecision("stopped", stop.reason, stop_reason(stop.reason).exit_code, 0)
            notifier.begin(attempt, config)
            failure = _train(attempt, config, node_spec, workers, listener, repeated)
        if attempt.is_superseded:  # its new owner writes what follows
            raise attempt.lost_ownership_error()
        report_failure(attempt, failure)
        decision = decide_restart(attempt, failure, workers, config.parallel)
        cause = find_cause(attempt, failure) if decision.status == "failed" else None
        failed = describe_failure(attempt, cause, node_spec)
        if repeated is not None:
            repeated.judge(failed, is_finished=decision.status == "finished")
        more = {"failure": failed and asdict(failed), "replay": None if repeated is None else repeated.verdict or None}
        decision = replace(decision, cause=describe_cause(cause))
        with heartbeat_thread(attempt):  # Slurm may take longer to answer than the other nodes would wait
            decision = requeue_instead(decision, node_spec, attempt, config, failed)
        if decision.message:
            goes_on = decision.status == "stopped" or decision.reason == "bad_node"
            LOGGER.log(logging.WARNING if goes_on else logging.ERROR, decision.message)
        if not decision.restarts:
            notifier.add_end(decision, in_job=node_spec.allocation is not None)
            _write_outcome(attempt, decision)
        end_attempt(attempt, decision.reason, decision.step, decision.exit_code, restarts=decision.restarts, **more)
        if not decision.restarts:
            return decision


def _begin(
    config: Config, node_spec: NodeSpec, workers: Workers, listener: socket.socket | None
) -> tuple[Config, Attempt, RepeatedSteps | None]:
    """Claim the next attempt and say so; return the run's settings, the attempt, and the failed steps that it repeats.

    Raises StopRequested if a stop is asked for meanwhile.
    """
    job, code = node_spec.allocation, None if node_spec.code is None else node_spec.code.name  # its digest
    address = None if listener is None else "{}:{}".format(*listener.getsockname())
    run = choose_run(config, LaunchEnv())
    last = last_attempt(run)  # read before start_attempt claims the next
    bad = {} if job is None else failures_by_bad_node(run, config, job.job_id)
    excluded = set() if job is None else excluded_nodes(job, bad)
    begin: dict[str, Any] = {
        "world_size": node_spec.world_size,
        "nnodes": node_spec.nnodes,
        "nodes": None if job is None else job.node_list,
        "excluded_nodes": {node: lines for node, lines in bad.items() if node in excluded},
        "slurm_job_id": None if job is None else job.job_id,
        "slurm_restart_count": None if job is None else job.restart_count,
        "code": code,
        "address": address,
    }
    config, attempt = start_attempt(config, run, lambda: workers.stop_reason, **begin)
    configure_logging(node_spec.process, attempt.number)
    ranks = f"{node_spec.world_size} rank{'s' * (node_spec.world_size > 1)}"
    where = "" if address is None else f" on {node_spec.nnodes} nodes, which meet at {address}"
    LOGGER.info(f"attempt {attempt.number} of {attempt.run.path}: {ranks}{where}; Ctrl-C saves and stops")
    code_before = None if last is None else last.read_begin().get("code")
    if code is not None and code_before not in (None, code):
        LOGGER.warning(f"the code has changed: {code} runs now, {code_before} ran before")
    for node, lines in bad.items():
        verb = "excludes" if node in excluded else "may run again on"
        LOGGER.warning(f"the job {verb} {describe_nodes({node: lines})}")
    return config, attempt, steps_to_repeat(last, config, None if job is None else job.job_id)


def _train(
    attempt: Attempt,
    config: Config,
    node_spec: NodeSpec,
    workers: Workers,
    listener: socket.socket | None,
    repeated: RepeatedSteps | None,
) -> RankFailure | None:
    """Run node 0's ranks of `attempt` to their end; return the first failure among them."""
    address = None if listener is None else "{}:{}".format(*listener.getsockname())
    with heartbeat_thread(attempt), meeting_place(address, node_spec.interface) as meeting:
        workers.start(attempt, config, node_spec, meeting, None if listener is None else listener.fileno())
        log = FileTail(attempt.log(0))

        def print_new() -> None:
            if new := b"".join(log.read_lines(partial=True)):
                write(new.decode(sys.stdout.encoding, errors="replace"), sys.stdout)

        def is_over() -> bool:
            if node_spec.time_limit is not None and node_spec.time_limit.has_come() and not workers.stop_signal:
                LOGGER.warning("the job's time limit is near, and Slurm's warning has not come")
                workers.forward_signal(signal.SIGUSR2, None)
            if repeated is not None:
                repeated.judge()
            # Rank 0 prints nothing until all ranks are connected. Ranks that wait for others in the rendezvous see
            # neither a signal nor the end of another rank. They have trained nothing that could be lost.
            stopped_before_connecting = log.offset == 0 and time.monotonic() - workers.stop_signal_at > MEETING_S
            return stopped_before_connecting or attempt.is_superseded or elsewhere() is not None

        def elsewhere() -> RankFailure | None:
            return first_failure(failure for failure in read_failures(attempt) if failure.rank not in node_spec.ranks)

        failure = find_first_failure(attempt, workers.watch(print_new, is_over))
        hung = failure or elsewhere()  # a rank of this node that is suspended fails only when it is killed
        if hung is not None and hung.reason == "hang":
            return find_cause_of_hang(attempt, hung, node_spec, OTHER_NODES_S)
        # A rank that lost its connection ends at once; the launcher of the node that is the cause may need a moment.
        patience_s = OTHER_NODES_S if node_spec.nnodes > 1 and failure is not None and failure.aftermath else 0.0
        began = time.monotonic()
        while ((lost := elsewhere()) is None or lost.aftermath) and time.monotonic() - began < patience_s:
            time.sleep(LOOK_EVERY_S)
        if lost is not None and not lost.aftermath and lost.reason not in REPLAYED:  # which all ranks raise
            LOGGER.error(f"rank {lost.rank}, on another node, failed: {lost.message}")
        return failure


def _write_outcome(attempt: Attempt, decision: RestartDecision) -> None:
    """Write outcome.json, unless rank 0 has written the same. Call it before end_attempt: another may begin then."""
    outcome = read_outcome(attempt.run)
    if outcome is not None and (outcome["status"], outcome["reason"]) == (decision.status, decision.reason):
        return
    writer = RunOutcomeWriter(attempt, owns=False, step=decision.step)
    if outcome is not None:
        writer.epoch, writer.metrics = outcome["epoch"], outcome.get("metrics")
    writer.end(decision.status, decision.reason, decision.exit_code)
