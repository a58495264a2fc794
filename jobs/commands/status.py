"""fnet status [RUN]: state, step, loss, test metric, speed and job; --watch, --json (look 1)

Without RUN: every run, the last active first. With RUN: that run and its attempts, or all runs of a sweep by its name
or job id, under the settings that differ.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fnet_dist.run.metrics_log import GPU_SPREADS, TIME_SPREADS
from fnet_dist.run.run_dir import RunDir, find_run, mtime, read_json
from jobs.bottleneck import describe_bottleneck
from jobs.cells import cell_labels, find_runs, read_sweep
from jobs.monitor.attempts import AttemptSummary, killed_jobs, read_attempts
from jobs.monitor.job_state import read_statuses
from jobs.monitor.run_state import Status
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, SlurmJob, SlurmSnapshot
from jobs.monitor.tables import attempts_table, facts_of, notes_of, table_of
from jobs.runs import command_parser, run_root

WATCH_EVERY_S = 2.0
MIN_WIDTH = 76  # columns; a narrower terminal wraps whole lines, which is better than figures cut in two
Screen = tuple[Group, bool]  # what to show, and whether the run has ended


def main(argv: Sequence[str]) -> int:
    """Show all runs of a root, or one run with its attempts. Raises ConfigError if there is none, or not that one."""
    args = _parser().parse_args(argv)
    root = run_root() if args.root is None else args.root.expanduser()
    if args.json:
        _print_json(args.run, root)
        return 0
    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, MIN_WIDTH if console.is_terminal else 1000)  # a pipe has no width
    snapshot = EMPTY_SNAPSHOT

    def look() -> Screen:
        nonlocal snapshot  # Slurm's answer serves several looks
        if args.run is None:
            shown, snapshot, _ = several_runs(runs_in(root), console, snapshot)
            return shown, False
        runs = find_runs(args.run, root)
        show = several_runs(runs, console, snapshot) if len(runs) > 1 else one_run(runs[0], console, snapshot)
        shown, snapshot, ended = show
        return shown, ended

    if args.watch:
        with suppress(KeyboardInterrupt):
            watch(look, console)
    else:
        console.print(look()[0])
    return 0


def watch(look: Callable[[], Screen], console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show what `look` returns every WATCH_EVERY_S seconds, until it says that the run has ended."""
    shown, ended = look()  # before Live takes the screen: an error of the first look leaves it untouched
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext(console) as screen:
        while True:
            dated = Group(Text(time.strftime("%Y-%m-%d %H:%M:%S"), style="dim"), shown)
            if isinstance(screen, Live):  # redraw in place; a pipe gets one table after the other
                screen.update(dated, refresh=True)
            else:
                screen.print(dated, "", sep="\n")
            if ended:  # nothing will change any more
                return
            wait(WATCH_EVERY_S)
            shown, ended = look()


def several_runs(
    runs: Sequence[RunDir], console: Console, before: SlurmSnapshot = EMPTY_SNAPSHOT
) -> tuple[Group, SlurmSnapshot, bool]:
    """Return a table of `runs`, Slurm's answer, and whether all runs have ended."""
    statuses, snapshot = read_statuses(runs, before)
    if labels := cell_labels([read_json(run.config) or {} for run in runs]):
        statuses = [replace(status, name=label) for status, label in zip(statuses, labels, strict=True)]
    ended = all(status.state.ended for status in statuses)
    shown: list[RenderableType] = [table_of(statuses, console), *notes_of(statuses, snapshot.note)]
    if labels and (command := read_sweep(runs[0]).get("command")):
        shown.append(Text(f"sweep: {command}", style="dim"))
    return Group(*shown), snapshot, ended


def one_run(run: RunDir, console: Console, before: SlurmSnapshot = EMPTY_SNAPSHOT) -> tuple[Group, SlurmSnapshot, bool]:
    """Return tables of a run and of its attempts, Slurm's answer, and whether the run has ended."""
    (status,), snapshot = read_statuses([run], before, killed_jobs(run))
    attempts = [] if status.is_unreadable else read_attempts(run, status.state, snapshot.records)
    shown: list[RenderableType] = [table_of([status], console), *facts_of(status, attempts)]
    shown += notes_of([status], snapshot.note)
    if attempts:
        shown += ["", attempts_table(attempts, console)]
    return Group(*shown), snapshot, status.state.ended


def status_json(status: Status, run: RunDir, attempts: Sequence[AttemptSummary]) -> dict[str, Any]:
    """Return the JSON object of one run. Keys are always present, null if unknown; times are Unix seconds.

    run, directory; state (running, queued, requeued, submitted, starting, resuming, stopping, ending, restarting,
    silent, suspended, finished, stopped, failed, cancelled, timeout, node failure, gone, unreadable, or another of
    Slurm's states), detail (a reason, or "not begun"), ended (no process or job works on it);
    step, total_steps, epoch, loss (mean over the last window), evaluation (null, or step, loss and metrics by name on
    the test data), monitor (the metric, or loss, that tells the best), samples_per_second, slowest_rank,
    bottleneck (where the time goes, as a sentence); data_ms, compute_ms, exchange_ms, gpu_percent, gpu_memory_gib,
    gpu_watts, gpu_celsius (of the last window: null, or min, median, max, max_rank, by_rank); time_left_s (training,
    at this speed); nodes; stand_in (name of the synthetic data that replaces the real), note;
    job: null, or id, state and reason in Slurm's words, node_list, submitted, started, expected, ends (null while it
    waits), restarts, told_by (squeue, sacct, or null where Slurm gave no answer);
    attempts, the newest first: number, end, detail, message (of the rank that failed first), node (of the rank at
    fault), step, began, waited_s, lasted_s, ranks, nodes, job_id, restarts, replay ("passed" or "failed again", if it
    repeated steps that had failed), excluded_nodes (by its job, with the causes).
    """
    figures, length, job = status.figures, status.length, None
    train, window, evaluation = figures.train or {}, figures.window or {}, figures.evaluation
    if status.run_job is not None:
        names = [field.name for field in fields(SlurmJob) if field.name != "job_id"]
        job = {"id": status.run_job.job_id} | {name: getattr(status.slurm_job, name, None) for name in names}
    attempts_json = [asdict(attempt) | {"detail": attempt.detail.strip("()") or None} for attempt in attempts]
    for values in attempts_json:
        del values["since"]  # `began` for people
    return {
        "run": status.name,
        "directory": str(run.path.absolute()),
        "state": status.state.word,
        "detail": status.state.detail.strip("()") or None,
        "ended": status.state.ended,
        "step": train.get("step"),
        "total_steps": None if length is None else length.total_steps,
        "epoch": train.get("epoch"),
        "loss": figures.loss,
        "evaluation": evaluation and {key: evaluation[key] for key in ("step", "loss", "metrics")},
        "monitor": status.monitor,
        "samples_per_second": window.get("samples_per_second"),
        "slowest_rank": window.get("slowest_rank"),
        "bottleneck": describe_bottleneck([window]) or None,
        **{key: window.get(key) for key in (*TIME_SPREADS, *GPU_SPREADS)},
        "time_left_s": status.left_s,
        "nodes": status.nodes,
        "stand_in": status.synthetic_name or None,
        "note": status.note or None,
        "job": job,
        "attempts": attempts_json,
    }


def _print_json(name: str | None, root: Path) -> None:
    runs = runs_in(root) if name is None else find_runs(name, root)
    is_one = name is not None and len(runs) == 1
    # Accounting is asked about one run only: of many, its answer may take long.
    statuses, snapshot = read_statuses(runs, starts=killed_jobs(runs[0]) if is_one else [])
    objects = [
        status_json(status, run, [] if status.is_unreadable else read_attempts(run, status.state, snapshot.records))
        for run, status in zip(runs, statuses, strict=True)
    ]
    print(json.dumps(objects[0] if is_one else objects, indent=2))
    if snapshot.note:
        print(snapshot.note, file=sys.stderr)  # standard output is JSON alone


def runs_in(root: Path) -> list[RunDir]:
    """Return the runs in `root`, the last active first. Raises ConfigError if there is none."""
    runs = [RunDir(path) for path in root.glob("*") if path.is_dir()]
    # Another user's run directory is mode 0700: it gets a row that says so.
    runs = [run for run in runs if not os.access(run.path, os.X_OK) or run.config.exists() or run.attempts.exists()]
    if not runs:
        find_run(None, root)  # raises, and says how to start one
    return sorted(runs, key=lambda run: max(map(mtime, (run.config, run.metrics_log, run.outcome))), reverse=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        epilog="loss: mean over the steps of the last window, about half a second; samples/s and slowest rank (its "
        "time over the median rank's): of that window; left: training at that speed, without evaluations; test: "
        "run.monitor's metric at the last evaluation; waited: from submission, or the end of the last allocation, to "
        "the attempt's begin. Slurm is asked by one squeue, at most every 10 s.",
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="where runs are (run_root in slurm/site.toml, or runs)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--watch", action="store_true", help="again every 2 s, until Ctrl-C or the end of RUN")
    group.add_argument("--json", action="store_true", help="an array with an object for each run, or of one RUN")
    return parser
