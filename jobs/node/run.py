"""python -m jobs run JOBFILE: train on this machine, attempt after attempt, until the run has ended.

Each attempt is a fresh set of processes that meet in a fresh place: what a dead rank left behind is never met again.
Restarts belong here and not to torchrun, whose store survives them (fnet_dist/README.md).
"""

import argparse
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext

from fnet_dist.attempt import Attempt, Progress, end_attempt, kept_alive, last_attempt
from fnet_dist.config import Config
from fnet_dist.console import final_table, how_to_go_on
from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.resume import STARTS_ANEW, check_run, claim_run, source_of
from fnet_dist.run_dir import read_json, read_outcome, run_of
from fnet_dist.runtime import Runtime
from fnet_dist.settings import load_config
from fnet_dist.settings_text import settings_help
from fnet_dist.stopping import SIGNALS, AskedToStop
from jobs.node.meeting import Pulse, interface_towards, open_door, wait_for_attempt
from jobs.node.ranks import Follower, Ranks, Sizes, last_lines, say
from jobs.node.verdict import Cause, Verdict, find_cause, judge

MEETING_S = 20.0  # from a signal on, for ranks that have not met yet


def main(argv: Sequence[str]) -> int:
    """Run the job file that argv names, and return the run's exit code."""
    if {"-h", "--help"} & set(argv):
        print(_parser().format_help() + "\n" + settings_help())
        return 0
    asked, overrides = _parser().parse_known_args(argv)
    node_rank = 0 if asked.nnodes == 1 and asked.node_rank is None else asked.node_rank
    if node_rank is None or not 0 <= node_rank < asked.nnodes:
        raise ConfigError(
            f"--node-rank {'not given' if node_rank is None else node_rank}, with --nnodes {asked.nnodes}: expected "
            f"this node's number, 0 to {asked.nnodes - 1}, another one on each"
        )
    sizes = Sizes(asked.nnodes, node_rank, _ranks_here(asked.nproc_per_node))
    config = load_config(["--config", asked.jobfile, *overrides])
    if sizes.nnodes > 1 and (config.checkpoint.resume == STARTS_ANEW or source_of(config) is not None):
        raise ConfigError(
            "checkpoint.resume never or PATH on several nodes: the others would not know the new run's name; start it "
            "on one node first, or give a new --run.name"
        )
    ranks = Ranks()
    if check_run(config) is not None:
        run = run_of(config)
        say(f"finished before, nothing is trained now: {run.path}\n{how_to_go_on(run)}\n{final_table(run)}")
        return 0
    with _handlers(ranks):
        return _lead(config, sizes, ranks) if sizes.node_rank == 0 else _follow(config, sizes, ranks)


def _lead(config: Config, sizes: Sizes, ranks: Ranks) -> int:
    """Node 0: claim an attempt, run it, judge it; again if that may help."""
    while True:
        with closing(open_door()) if sizes.nnodes > 1 else nullcontext() as door:
            address = None if door is None else "{}:{}".format(*door.getsockname())
            try:
                config, attempt = claim_run(
                    config,
                    Runtime(),
                    lambda: ranks.reason,
                    world_size=sizes.world_size,
                    nnodes=sizes.nnodes,
                    address=address,
                )
            except AskedToStop:
                return ranks.exit_code
            ranks_there = f"{sizes.world_size} rank{'s' * (sizes.world_size > 1)}"
            where = "" if address is None else f" on {sizes.nnodes} nodes, which meet at {address}"
            say(f"attempt {attempt.number} of {attempt.run.path}: {ranks_there}{where}; Ctrl-C saves and stops")
            cause = _train(attempt, config, sizes, ranks, address, door)
        if attempt.is_superseded:
            raise attempt.lost()
        _show(attempt, cause)
        verdict = judge(attempt, cause, ranks, config.parallel.max_restarts)
        if verdict.words:
            say(verdict.words, sys.stderr)
        if not verdict.restarts:
            return _end(attempt, verdict)
        end_attempt(attempt, verdict.reason, verdict.step, verdict.exit_code, restarts=True)


def _train(
    attempt: Attempt, config: Config, sizes: Sizes, ranks: Ranks, address: str | None, door: socket.socket | None
) -> Cause | None:
    """Node 0's ranks of `attempt`, from start to end; why it failed, if it did."""
    with kept_alive(attempt), _meeting(address) as meeting:
        ranks.start(attempt, config, sizes, meeting, None if door is None else door.fileno())
        log = Follower(attempt.log(0))

        def is_over() -> bool:
            # A rank that waits for others to come sees no signal; it has trained nothing that could be lost.
            in_vain = log.is_empty and time.monotonic() - ranks.asked_at > MEETING_S
            return in_vain or attempt.is_superseded

        return find_cause(attempt, ranks.watch(log.show, is_over))


def _end(attempt: Attempt, verdict: Verdict) -> int:
    """The attempt was the run's last for now: end.json, and outcome.json where rank 0 has not written what counts."""
    outcome = read_outcome(attempt.run)
    if outcome is not None and outcome["status"] == verdict.status and outcome["reason"] == verdict.reason:
        end_attempt(attempt, verdict.reason, verdict.step, verdict.exit_code)
    else:
        progress = Progress(attempt, step=verdict.step)
        if outcome is not None:
            progress.epoch, progress.test_accuracy = outcome["epoch"], outcome["test_accuracy"]
        progress.end(verdict.status, verdict.reason, verdict.exit_code)
    return verdict.exit_code


def _show(attempt: Attempt, cause: Cause | None) -> None:
    """Name the rank that failed first, with the end of its log; what rank 0 said is on the screen already."""
    if cause is None:
        return
    log = last_lines(attempt.log(cause.rank))
    if cause.rank != 0 and log:
        say(f"the end of {attempt.log(cause.rank)}:\n{log}")
    if cause.rank != 0 or cause.message not in log:
        say(f"attempt {attempt.number}: rank {cause.rank} failed first: {cause.message}", sys.stderr)


def _follow(config: Config, sizes: Sizes, ranks: Ranks) -> int:
    """The other nodes: join each attempt that node 0 begins, until one says that it was the last."""
    run, known = run_of(config), last_attempt(run_of(config))
    number, begun = 0, known.number if known else 0
    while True:
        attempt = wait_for_attempt(run, number, begun, 10 * config.parallel.timeout_s, lambda: bool(ranks.asked))
        if attempt is None:
            return ranks.exit_code
        number, begin = attempt.number, read_json(attempt.begin)
        if begin["world_size"] != sizes.world_size or begin["address"] is None:
            raise ConfigError(
                f"node 0 runs {begin['world_size']} ranks on {begin.get('nnodes', 1)} nodes, this node was told "
                f"{sizes.world_size} on {sizes.nnodes}; give all nodes the same --nnodes and --nproc-per-node"
            )
        pulse = Pulse(attempt)
        if not pulse.is_over():
            with _meeting(begin["address"]) as meeting:
                ranks.start(attempt, config, sizes, meeting, None)
                _show(attempt, find_cause(attempt, ranks.watch(lambda: None, pulse.is_over)))
        end = pulse.wait_for_end()
        if end is not None and not end["restarts"]:
            return int(end["exit_code"])
        if ranks.asked:
            run.stop.touch()  # node 0 has not heard of it
            return ranks.exit_code
        if end is None and not attempt.is_superseded:
            raise FnetError(f"node 0 shows no life in {run.attempt(number)}; start all nodes again to go on")


@contextmanager
def _meeting(address: str | None) -> Iterator[dict[str, str]]:
    """Where the ranks meet, as variables: node 0's door, or on one node a file that nobody else can reach.

    On one node everything listens on loopback, if it listens at all.
    """
    with tempfile.TemporaryDirectory(prefix="fnet-") as private:  # 0700
        host, _, port = (address or "127.0.0.1:0").rpartition(":")
        interface = "lo" if address is None else interface_towards(host)
        named = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        where = f"file://{private}/meeting" if address is None else f"tcp://{address}"
        yield {"MASTER_ADDR": host, "MASTER_PORT": port, "FNET_INIT_METHOD": where, **named}


@contextmanager
def _handlers(ranks: Ranks) -> Iterator[None]:
    before = {number: signal.signal(number, ranks.pass_on) for number in SIGNALS}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup: a terminal that goes asks for a stop
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda number, frame: ranks.pass_on(signal.SIGTERM, frame))
    try:
        yield
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


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
        description="Train on this machine; after a crash, go on from the last checkpoint.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file, or a run's config.json")
    parser.add_argument("--nproc-per-node", default="1", metavar="N", help="ranks on this node, or gpu: one for each")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes, each with its own `jobs run`")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    return parser
