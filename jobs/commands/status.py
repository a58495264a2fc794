"""fnet status [RUN]: state, step, loss, accuracy, speed and job; --watch, --json (look)"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fnet_dist.run.run_dir import RunDir, find_run, mtime
from jobs.monitor.as_json import print_json, values_of
from jobs.monitor.attempts import AttemptSummary, read_attempts, wordless_jobs
from jobs.monitor.job_state import read_statuses
from jobs.monitor.run_state import Status
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, SlurmSnapshot
from jobs.monitor.tables import attempts_table, facts_of, notes_of, table_of
from jobs.runs import find_run_or_job, run_root

WATCH_EVERY_S = 2.0
NARROWEST = 76  # columns; on less a terminal folds whole lines, which is better than figures cut in two
Shown = tuple[Group, bool]


def main(argv: Sequence[str]) -> int:
    """Show all runs of a root, or one with its attempts. Raises ConfigError where there is none, or not the one."""
    asked = _parser().parse_args(argv)
    root = run_root() if asked.root is None else asked.root.expanduser()
    if asked.json:
        _print_json(asked.run, root)
        return 0
    console = Console(file=sys.stdout, highlight=False)
    if console.width < (least := NARROWEST if console.is_terminal else 1000):  # a pipe has no width
        console.width = least
    answers = EMPTY_SNAPSHOT

    def again() -> Shown:
        nonlocal answers
        if asked.run is None:
            shown, answers = all_runs(root, console, answers)
            return shown, False
        shown, answers, ended = one_run(find_run_or_job(asked.run, root), console, answers)
        return shown, ended

    if not asked.watch:
        console.print(again()[0])
    else:
        with suppress(KeyboardInterrupt):
            watch(again, console)
    return 0


def watch(again: Callable[[], Shown], console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show what `again` gives again and again, until it says that this was the end."""
    shown, ended = again()  # what it raises the first time is told on an untouched screen
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext(console) as screen:
        while True:
            dated = Group(Text(time.strftime("%Y-%m-%d %H:%M:%S"), style="dim"), shown)
            if isinstance(screen, Live):
                screen.update(dated, refresh=True)
            else:
                screen.print(dated, "", sep="\n")
            if ended:
                return
            wait(WATCH_EVERY_S)
            shown, ended = again()


def all_runs(root: Path, console: Console, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[Group, SlurmSnapshot]:
    """A table of the runs in `root`."""
    found, answers = read_statuses(_runs(root), before)
    return Group(table_of(found, console), *notes_of(found, answers.note)), answers


def one_run(run: RunDir, console: Console, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[Group, SlurmSnapshot, bool]:
    """A run, its attempts, and whether it has ended."""
    status, past, answers = _look_at(run, before)
    attempts: list[RenderableType] = ["", attempts_table(past, console)] if past else []
    shown = table_of([status], console), *facts_of(status, past), *notes_of([status], answers.note), *attempts
    return Group(*shown), answers, status.state.ended


def _look_at(run: RunDir, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[Status, list[AttemptSummary], SlurmSnapshot]:
    (status,), answers = read_statuses([run], before, wordless_jobs(run))
    return status, [] if status.note else read_attempts(run, status.state, answers.past), answers


def _print_json(text: str | None, root: Path) -> None:
    if text is not None:
        run = find_run_or_job(text, root)
        status, past, answers = _look_at(run)
        print_json(values_of(status, str(run.path), past))
    else:
        runs = _runs(root)
        found, answers = read_statuses(runs)
        past_of = [
            [] if status.note else read_attempts(run, status.state) for run, status in zip(runs, found, strict=True)
        ]
        both = zip(runs, found, past_of, strict=True)
        print_json([values_of(status, str(run.path.absolute()), past) for run, status, past in both])
    if answers.note:
        print(answers.note, file=sys.stderr)


def _runs(root: Path) -> list[RunDir]:
    """The runs in `root`, those that were active last first. Raises ConfigError if there is none."""
    runs = [RunDir(path) for path in root.glob("*") if path.is_dir()]
    # Another user's run cannot be looked into; it has a row that says so.
    runs = [run for run in runs if not os.access(run.path, os.X_OK) or run.config.exists() or run.attempts.exists()]
    if not runs:
        find_run(None, root)  # says how to start one
    return sorted(runs, key=lambda run: max(map(mtime, (run.config, run.metrics_log, run.outcome))), reverse=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnet status",
        description="State, step, loss, accuracy, speed of every run, the last active first; or RUN and its attempts.",
        epilog="loss: mean over the steps of the last window, about half a second; samples/s and slowest rank (its "
        "time over the median rank's): of that window; left: training at that speed, without evaluations; accuracy: on "
        "the test images, after the last epoch; waited: from submission, or the end of the allocation before, to the "
        "attempt's begin. What Slurm says is asked with one squeue, and again after 10 s.",
    )
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name or directory, or a Slurm job; left out, all"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="where runs are (run_root in slurm/site.toml, or runs)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="again every 2 s, until Ctrl-C or the end of RUN")
    how.add_argument("--json", action="store_true", help="an array with an object for each run, or the object of RUN")
    return parser
