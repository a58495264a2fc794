"""fnet logs [RUN]: what the ranks printed; -f, --rank 0,3, --node all, --attempt N, --grep TEXT (look 2)"""

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress

from jobs.monitor.log_view import View, follow, show
from jobs.runs import chosen_numbers, command_parser, find_run_or_job


def main(argv: Sequence[str]) -> int:
    """Show logs; return 0 also if Ctrl-C ends it.

    Raises ConfigError, naming what there is, if there is no such run, attempt, rank or log.
    """
    args = _parser().parse_args(argv)
    kind, chosen = ("rank", args.rank) if args.node is None else ("node", args.node)
    view = View(_labels(chosen, kind), os.fsencode(args.grep), kind == "node")
    run = find_run_or_job(args.run)
    if args.follow:
        with suppress(KeyboardInterrupt):  # the usual way to end it, so no error
            follow(run, args.attempt, view)
    else:
        show(run, args.attempt, view)
    return 0


def _labels(text: str, kind: str) -> tuple[str, ...] | None:
    """Return the labels of the ranks or nodes that a command line names; None for all."""
    numbers = chosen_numbers(text, kind)
    return None if numbers is None else tuple(f"{kind} {number}" for number in numbers)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        epilog="-f ends when the run has ended and no job of it is in Slurm's queue; it waits for a run that has not "
        "started, and continues with each new attempt. If a job ended before its first attempt, what its launchers "
        "printed is shown. Lines of several ranks have a prefix, as `rank 3 | `, and come rank after rank; with -f, in "
        "the order in which they are written.",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="continue with what is printed from now on")
    parser.add_argument("--rank", default="0", metavar="R,R|all", help="these ranks, as 0,3, or all (%(default)s)")
    parser.add_argument(
        "--node", metavar="N,N|all", help="instead, what the launchers of the job's nodes printed, setup lines included"
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="only this attempt, counted from 1")
    parser.add_argument("--grep", default="", metavar="TEXT", help="only lines that contain TEXT, not a pattern")
    return parser
