"""fnet ask RUN WHAT: save a checkpoint, show Python stacks or profile steps of a run while it trains (look 7)

WHAT is save, stacks or profile. The request is the file ASK in the run's directory. Rank 0 looks for it once a window,
about every half second, on whichever machine it is; the answer is in the directory of the attempt. The command waits
for it. No bit of the training changes.
"""

import argparse
import secrets
import time
from collections.abc import Sequence

from fnet_dist.errors import ConfigError, FnetError
from fnet_dist.run.ask import MAX_STEPS, Request, read_request, remove_request, write_request
from fnet_dist.run.attempt import Attempt, is_alive, last_attempt
from fnet_dist.run.console import fnet_command
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.sharing import share_files
from jobs.monitor.job_state import state_of
from jobs.runs import check_control, chosen_numbers, command_parser, find_run_or_job
from slurm.site_config import read_site

PROFILED_RANKS = 8  # without --rank: those of one node, as a rule
LOOK_EVERY_S = 0.5
MAX_LATE_S = 60.0  # an NFS client may show the answer this long after the request has gone


def main(argv: Sequence[str]) -> int:
    """Write the request, wait for the answer and print where it is.

    Raises ConfigError if the run does not train or a request is open, FnetError if the answer does not come or tells of
    errors.
    """
    args = _parser().parse_args(argv)
    run = find_run_or_job(args.run)
    check_control(run, read_site())
    share_files(run.path)
    state, _, _ = state_of(run)
    attempt = last_attempt(run)
    if state.word != "running" or attempt is None:
        raise ConfigError(f"{run.path} does not train: {' '.join(state.text.split())}; only a run that trains answers")
    steps, ranks = _steps(args), _ranks(args, attempt.read_begin()["world_size"])
    request = Request(kind=args.what, attempt=attempt.number, id=secrets.token_hex(4), ranks=ranks, steps=steps)
    try:
        write_request(run, request)
    except FileExistsError:
        other = read_request(run)
        where = "" if other is None else f" ({other.kind}); its answer will be in {other.folder(run)}"
        raise ConfigError(f"a request is open: {run.ask}{where}; wait for it, or remove the file") from None
    print(f"{run.name}: asked attempt {attempt.number}; the answer will be in {request.folder(run)}", flush=True)
    print(_wait_for_answer(run, attempt, request))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        epilog="stacks: the Python stack of every thread, a file for each rank. profile: a trace of the next steps for "
        "ui.perfetto.dev or chrome://tracing, and a table of the ten longest operations, for each rank. A profile "
        "waits until its steps come without an evaluation in between.",
    )
    parser.add_argument("what", metavar="WHAT", choices=("save", "stacks", "profile"), help="save, stacks or profile")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of a profile, 1 to {MAX_STEPS} (20)")
    parser.add_argument(
        "--rank", metavar="R,R|all", help=f"these ranks (stacks: all; profile: the first {PROFILED_RANKS})"
    )
    return parser


def _steps(args: argparse.Namespace) -> int:
    if args.steps is None:
        return 20
    if args.what != "profile":
        raise ConfigError(f"--steps {args.steps} is for profile, not for {args.what}")
    if not 1 <= args.steps <= MAX_STEPS:
        raise ConfigError(f"--steps {args.steps}: expected 1 to {MAX_STEPS}")
    return int(args.steps)


def _ranks(args: argparse.Namespace, world_size: int | None) -> tuple[int, ...] | None:
    """Return the ranks that are asked; None for all."""
    if args.rank is None:
        return tuple(range(PROFILED_RANKS)) if args.what == "profile" else None
    if args.what == "save":
        raise ConfigError(f"--rank {args.rank} is for stacks and profile: a checkpoint is of all ranks")
    ranks = chosen_numbers(args.rank, "rank")
    if ranks is not None and world_size is not None and ranks[-1] >= world_size:
        raise ConfigError(f"--rank {args.rank}: the attempt has ranks 0 to {world_size - 1}")
    return ranks


def _wait_for_answer(run: RunDir, attempt: Attempt, request: Request) -> str:
    """Return what to print of the answer, once it is there."""
    gone_since: float | None = None
    while (answer := read_json(request.answer(run))) is None:
        is_over = attempt.end.exists() or not is_alive(attempt)  # first: rank 0 may answer, then end
        if read_request(run) == request:
            gone_since = None
            if is_over:
                remove_request(run, request)
                raise FnetError(f"attempt {attempt.number} of {run.name} ended before it answered")
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > MAX_LATE_S:
            raise FnetError(f"{run.ask} was removed, and there is no answer; see {fnet_command()} logs {run.name}")
        time.sleep(LOOK_EVERY_S)
    if answer["errors"]:
        raise FnetError(f"{request.kind}: {'; '.join(answer['errors'])}; see {request.folder(run)}")
    if request.kind == "save":
        return f"saved {answer['checkpoint']}"
    steps = "" if answer["steps"] is None else "steps {:,} to {:,}: ".format(*answer["steps"])
    return f"{steps}{request.folder(run)}"
