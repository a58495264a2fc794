"""Show and follow the logs of a run's ranks, or of its job's launchers, over restarts and requeues.

Logs may be large and need not be text: they are read line by line, and their bytes are printed unchanged.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import Attempt, last_attempt, list_attempts
from fnet_dist.run.run_dir import RunDir, node_logs
from fnet_dist.run.tail import FileTail
from jobs.monitor.job_state import NOT_LAUNCHED, state_of, waiting_message
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, run_job_of
from jobs.monitor.tables import LEGEND
from jobs.text import describe_nodes

FOLLOW_EVERY_S = 1.0  # each look opens every log that is shown, which may be on a shared disk
MAX_LINE = 1 << 20  # bytes; a longer line is printed in parts
COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


@dataclass(frozen=True)
class View:
    """The logs with one of `labels` (None: all), and of them the lines that contain `text`.

    The logs are those of the ranks or, with `of_nodes`, of the launchers on the job's nodes.
    """

    labels: tuple[str, ...] | None = ("rank 0",)
    text: bytes = b""
    of_nodes: bool = False


@dataclass
class Log:
    """A rank's or launcher's log, which may not exist yet; `prefix` tells its lines from those of others."""

    label: str
    tail: FileTail
    prefix: bytes = b""

    def print_new(self, text: bytes, *, partial: bool) -> None:
        """Print those of the new lines that contain `text`; with `partial` also an unfinished last one."""
        for line in self.tail.read_lines(partial=partial, max_bytes=MAX_LINE):
            content = line.removesuffix(b"\n")
            if self.prefix:
                # A carriage return would go back over the prefix: show the last state of a progress line.
                content = content.removesuffix(b"\r").rpartition(b"\r")[2]
            if text in content:
                sys.stdout.buffer.write(self.prefix + content + b"\n")
        sys.stdout.buffer.flush()  # a pipe would else get a line only when its block is full


def show(run: RunDir, number: int | None, view: View) -> None:
    """Print the logs of attempt `number`, the newest if None, one after the other.

    Raises ConfigError, naming what there is, if there is no such attempt or log.
    """
    run_job = run_job_of(run) if number is None else None
    if run_job is not None and run_job.restarts is None and (logs := launcher_logs(run, run_job.job_id)):
        _note(f"job {run_job.job_id} has not begun an attempt; its launchers printed:")
        _print_all(_prefixed(logs), view)  # those of all nodes: any of them may have the error
        return
    attempt = _find_attempt(run, number)
    if attempt is None:
        state, run_job, snapshot = state_of(run)
        if state.detail == NOT_LAUNCHED and run_job is not None:
            raise ConfigError(f"job {run_job.job_id}: {state.word} {state.detail}: {LEGEND[NOT_LAUNCHED]}")
        reason = "" if run_job is None else waiting_message(run_job, snapshot)
        raise ConfigError(f"{run.name} has no attempt yet{reason and f', {reason}'}; -f waits for it")
    logs = _select_logs(attempt, view)
    if missing := _missing_message(attempt, logs):
        raise ConfigError(missing)
    _note_excluded(attempt)
    _print_all(logs, view)  # one after the other, because lines carry no time to sort them by
    if not any(log.tail.offset for log in logs):
        _note(f"attempt {attempt.number} has printed nothing yet; -f waits for it")


def follow(run: RunDir, number: int | None, view: View, wait: Callable[[float], None] = time.sleep) -> None:
    """Print logs as they grow: of attempt `number` until it ends, or if None from the newest on until the run ends."""
    attempt = _find_attempt(run, number)
    logs = [] if attempt is None else _select_logs(attempt, view)
    if attempt is None:
        _note(f"{run.name} has no attempt yet; waiting for it")
    elif missing := _missing_message(attempt, logs):
        _note(missing)
    snapshot, noted = EMPTY_SNAPSHOT, ""  # the last note, so that each is printed once
    while True:
        # The state before the logs: what was printed before an end is then read after it.
        state, run_job, snapshot = state_of(run, snapshot)
        if attempt is None and (attempt := last_attempt(run)) is not None:
            logs = _select_logs(attempt, view)
            continue  # the state may be from before it began
        if attempt is None:
            is_over = state.ended and run_job is not None  # without a job it may still be started by hand
        else:
            is_over = state.ended or attempt.is_superseded or (number is not None and attempt.end.exists())
        for log in logs:
            log.print_new(view.text, partial=is_over)
        if is_over:
            if attempt is None or number is not None or not attempt.is_superseded:
                break
            later = (each for each in list_attempts(run) if each.number > attempt.number)
            attempt, snapshot, noted = next(later), EMPTY_SNAPSHOT, ""
            logs = _select_logs(attempt, view)
            _note(f"attempt {attempt.number}")
            _note_excluded(attempt)
            continue
        if state.word != "running" and run_job is not None and not run_job.is_over:
            message = waiting_message(run_job, snapshot)
            if message and message != noted:
                noted = message
                _note(message)
        wait(FOLLOW_EVERY_S)
    if number is not None:
        return
    state, run_job, _ = state_of(run)
    if run_job is None or run_job.is_over or not state.ended or state.word == "finished":
        return
    # No rank could record how the job ended.
    _note(f"{run.name}: job {run_job.job_id}: {state.text}".replace("\n", " "))
    if state.detail == NOT_LAUNCHED:
        _note(LEGEND[NOT_LAUNCHED])
    if run_job.restarts is None and (logs := launcher_logs(run, run_job.job_id)):
        _note("its launchers printed:")
        _print_all(_prefixed(logs), view)


def launcher_logs(run: RunDir, job_id: str) -> list[Log]:
    """Return the logs of a job's launchers, over all its allocations; a site's setup lines print to node 0's."""
    paths = {int(path.name.split("_")[-2]): path for path in node_logs(run, job_id)}
    return [Log(f"node {node}", FileTail(paths[node])) for node in sorted(paths)]


def _print_all(logs: Sequence[Log], view: View) -> None:
    for log in logs:
        log.print_new(view.text, partial=True)


def _find_attempt(run: RunDir, number: int | None) -> Attempt | None:
    """Return attempt `number`, or the newest if None; None before the first. Raises ConfigError if it is not there."""
    last = last_attempt(run)
    if number is None:
        return last
    if last is None or not 1 <= number <= last.number:
        there = "none yet" if last is None else f"attempt 1 to attempt {last.number}"
        raise ConfigError(f"{run.name} has no attempt {number}; it has {there}")
    return Attempt(run, number)


def _select_logs(attempt: Attempt, view: View) -> list[Log]:
    """Return the logs that `view` names, from their beginning. Raises ConfigError if one of them is not there."""
    begin = attempt.read_begin()
    if not view.of_nodes:
        ranks = begin["world_size"] or len([*attempt.logs.glob("rank_*.log")]) or 1
        found = [Log(f"rank {rank}", FileTail(attempt.log(rank))) for rank in range(ranks)]
    else:
        found = [] if begin["slurm_job_id"] is None else launcher_logs(attempt.run, begin["slurm_job_id"])
    where = f"attempt {attempt.number} of {attempt.run.name}"
    if not found:
        raise ConfigError(f"{where} has no launchers' logs: only a job of `fnet submit` or `fnet sweep` keeps them")
    if view.labels is None:
        return _prefixed(found)
    logs = {log.label: log for log in found}
    for label in view.labels:
        if label not in logs:
            raise ConfigError(f"{where} has no {label}; it has {found[0].label} to {found[-1].label}")
    chosen = [logs[label] for label in view.labels]
    return chosen if len(chosen) == 1 else _prefixed(chosen)


def _prefixed(logs: Sequence[Log]) -> list[Log]:
    """Give each log a prefix of equal width, and a colour."""
    width = max(len(log.label) for log in logs)
    for i, log in enumerate(logs):
        log.prefix = _styled(f"{log.label:<{width}} | ", COLOURS[i % len(COLOURS)])
    return [*logs]


def _missing_message(attempt: Attempt, logs: Sequence[Log]) -> str:
    """Return a message if none of the logs exists, else ""."""
    if any(log.tail.path.exists() for log in logs):
        return ""
    whose = logs[0].label if len(logs) == 1 else "any of these"
    return (
        f"attempt {attempt.number} of {attempt.run.name} has no log of {whose}; only `fnet run` keeps logs, "
        "under torchrun ranks print to its own terminal"
    )


def _note_excluded(attempt: Attempt) -> None:
    """Print which nodes the attempt's job excludes, and why; nothing if it excludes none."""
    if nodes := attempt.read_begin().get("excluded_nodes"):
        _note(f"the job excludes {describe_nodes(nodes)}")


def _note(text: str) -> None:
    """Print a line that no rank printed."""
    sys.stdout.buffer.write(_styled(text, "dim") + b"\n")
    sys.stdout.buffer.flush()


def _styled(text: str, style: str) -> bytes:
    """Return `text` in `style` if standard output is a terminal, else as it is."""
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(Text(text, style=style), end="", soft_wrap=True)
    return capture.get().encode()
