"""fnet logs [RUN]: what the ranks printed; -f, --rank 0,3, --node all, --attempt N, --grep TEXT (look)

Logs may be large and need not be text: they are read line by line, and their bytes are printed as they are.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import Attempt, last_attempt
from fnet_dist.run.console import mute
from fnet_dist.run.run_dir import RunDir, node_logs, read_json
from jobs.monitor.job_state import state_of, waiting
from jobs.monitor.slurm_queue import EMPTY_SNAPSHOT, RunJob, SlurmSnapshot, run_job_of
from jobs.runs import find_run_or_job

LOOK_EVERY_S = 1.0  # a look opens every log that is shown, on a shared disk perhaps
LONGEST = 1 << 20  # bytes; a longer line is shown in pieces
COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
ALL = "all"


@dataclass(frozen=True)
class Log:
    """A log, which may not be there yet, and who writes it."""

    label: str
    path: Path


@dataclass(frozen=True)
class View:
    """What is to be shown: the logs of ranks, or of nodes' launchers, with one of `labels` (None: every one), of them
    the lines that contain `text`."""

    labels: tuple[str, ...] | None = ("rank 0",)
    text: bytes = b""
    of_nodes: bool = False


@dataclass
class Reader:
    """Takes a log up where it was left."""

    log: Log
    prefix: bytes = b""
    at: int = 0

    def new(self, *, rest: bool) -> Iterator[bytes]:
        """The whole lines that have come since the last call; with `rest` also what no newline has ended yet."""
        with suppress(FileNotFoundError), self.log.path.open("rb") as file:  # opening asks a shared file system anew
            file.seek(self.at)
            while line := file.readline(LONGEST):
                if not line.endswith(b"\n") and len(line) < LONGEST and not rest:
                    break
                self.at += len(line)
                yield line

    def show_new(self, text: bytes, *, rest: bool) -> None:
        """Print those of the new lines that contain `text`."""
        for line in self.new(rest=rest):
            words = line.removesuffix(b"\n")
            if self.prefix:  # a carriage return would go back over it: of a progress line the last state is shown
                words = words.removesuffix(b"\r").rpartition(b"\r")[2]
            if text in words:
                sys.stdout.buffer.write(self.prefix + words + b"\n")
        sys.stdout.buffer.flush()


def main(argv: Sequence[str]) -> int:
    """Show logs; 0 also where Ctrl-C or a reader that has had enough ends it.

    Raises ConfigError, naming what is there, where a run, an attempt, a rank or its log is not.
    """
    parser = argparse.ArgumentParser(
        prog="fnet logs",
        description="What rank 0 printed in the newest attempt.",
        epilog="-f ends when the run has ended and no job of it is in Slurm's queue; it waits for a run that has not "
        "started, and goes over to each attempt that begins. Of a job that ended before its first attempt, what its "
        "launchers printed is shown. Lines of several ranks are told apart by `rank 3 | `, and come rank after rank, "
        "with -f as they are written.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory, or a Slurm job; the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is printed from now on")
    parser.add_argument("--rank", default="0", metavar="R,R|all", help="these ranks, as 0,3, or all (%(default)s)")
    parser.add_argument(
        "--node", metavar="N,N|all", help="instead, what the launchers of the job's nodes printed, setup lines included"
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="this attempt alone, counted from 1")
    parser.add_argument("--grep", default="", metavar="TEXT", help="only lines that contain TEXT, letter for letter")
    asked = parser.parse_args(argv)
    kind, chosen = ("rank", asked.rank) if asked.node is None else ("node", asked.node)
    view = View(labels_of(chosen, kind), os.fsencode(asked.grep), kind == "node")
    run = find_run_or_job(asked.run)
    try:
        if asked.follow:
            with suppress(KeyboardInterrupt):
                follow(run, asked.attempt, view)
        else:
            show(run, asked.attempt, view)
    except BrokenPipeError:
        mute(sys.stdout)
    return 0


def labels_of(text: str, kind: str = "rank") -> tuple[str, ...] | None:
    """The labels of the ranks, or nodes, that a command line names; None for all."""
    if text == ALL:
        return None
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(f"--{kind} {text!r}: expected a {kind}, several as in 0,3, or {ALL}")
    return tuple(f"{kind} {number}" for number in sorted({*map(int, numbers)}))


def logs_of(attempt: Attempt, *, of_nodes: bool = False) -> list[Log]:
    """The logs of `attempt`'s ranks, or of the launchers of its job, in the order they are shown in; each may come
    later, or never."""
    begin = read_json(attempt.begin)
    if not of_nodes:
        return [Log(f"rank {rank}", attempt.log(rank)) for rank in range(begin["world_size"])]
    return [] if begin["slurm_job_id"] is None else launcher_logs(attempt.run, begin["slurm_job_id"])


def launcher_logs(run: RunDir, job_id: str) -> list[Log]:
    """What the launchers of a job have printed, over all its allocations; setup lines print where node 0 does."""
    found = {int(path.name.split("_")[-2]): path for path in node_logs(run, job_id)}
    return [Log(f"node {node}", found[node]) for node in sorted(found)]


def show(run: RunDir, number: int | None, view: View) -> None:
    """Print the logs that `view` names of attempt `number`, the newest if None, one after the other."""
    turn = run_job_of(run) if number is None else None
    if turn is not None and turn.restarts is None and (logs := launcher_logs(run, turn.job_id)):
        _note(f"job {turn.job_id} has not begun an attempt; its launchers said:")
        _show_all(_prefixed(logs), view)  # of all nodes: one of them knows why
        return
    attempt = _attempt(run, number)
    if attempt is None:
        raise ConfigError(f"{run.name} has no attempt yet{_queued(run)}; -f waits for it")
    readers = _readers(attempt, view)
    if missing := _missing(attempt, readers):
        raise ConfigError(missing)
    _show_all(readers, view)
    if not any(reader.at for reader in readers):
        _note(f"attempt {attempt.number} has printed nothing yet; -f waits for it")


def _show_all(readers: Sequence[Reader], view: View) -> None:
    for reader in readers:
        reader.show_new(view.text, rest=True)


def _queued(run: RunDir) -> str:
    """What the run waits for, to be put behind a comma."""
    _, turn, answers = state_of(run)
    said = "" if turn is None else waiting(turn, answers)
    return f", {said}" if said else ""


def follow(run: RunDir, number: int | None, view: View, wait: Callable[[float], None] = time.sleep) -> None:
    """Print the logs that `view` names as they grow: of attempt `number` until it ends, or if None from the newest on
    until the run ends, over restarts and requeues."""
    attempt = _attempt(run, number)
    if attempt is None:
        _note(f"{run.name} has no attempt yet; waiting for it")
        attempt = _first_attempt(run, wait)
    elif missing := _missing(attempt, _readers(attempt, view)):
        _note(missing)
    while attempt is not None:
        _follow_attempt(attempt, view, wait, alone=number is not None)
        if number is not None or not attempt.is_superseded:
            break
        attempt = Attempt(run, attempt.number + 1)
        _note(f"attempt {attempt.number}")
    if number is None:
        _say_the_end(run, view)


def _first_attempt(run: RunDir, wait: Callable[[float], None]) -> Attempt | None:
    """The first attempt once it is there; None once the job that was to begin it is gone."""
    answers, said = EMPTY_SNAPSHOT, ""
    while True:
        state, turn, answers = state_of(run, answers)
        if (attempt := last_attempt(run)) is not None:
            return attempt
        if turn is not None and state.ended:
            return None
        said = _note_news(said, turn, answers)
        wait(LOOK_EVERY_S)


def _follow_attempt(attempt: Attempt, view: View, wait: Callable[[float], None], *, alone: bool) -> None:
    readers, answers, said = _readers(attempt, view), EMPTY_SNAPSHOT, ""
    while True:
        state, turn, answers = state_of(attempt.run, answers)  # asked first: nothing is printed after an end
        is_over = state.ended or attempt.is_superseded or (alone and attempt.end.exists())
        for reader in readers:
            reader.show_new(view.text, rest=is_over)
        if is_over:
            return
        if state.word != "running":
            said = _note_news(said, turn, answers)
        wait(LOOK_EVERY_S)


def _note_news(said: str, turn: RunJob | None, answers: SlurmSnapshot) -> str:
    """Say what the run waits for in Slurm, if that is not what was `said` last; returns what is said by now."""
    news = "" if turn is None or turn.is_over else waiting(turn, answers)
    if news and news != said:
        _note(news)
    return news or said


def _say_the_end(run: RunDir, view: View) -> None:
    """Say how a job ended of which no rank could tell."""
    state, turn, _ = state_of(run)
    if turn is None or turn.is_over or not state.ended or state.word == "finished":
        return
    _note(f"{run.name}: job {turn.job_id}: {state.text}".replace("\n", " "))
    if turn.restarts is None and (logs := launcher_logs(run, turn.job_id)):
        _note("its launchers said:")
        _show_all(_prefixed(logs), view)


def _attempt(run: RunDir, number: int | None) -> Attempt | None:
    """Attempt `number`, or the newest if None; None before the first. Raises ConfigError if there is no such one."""
    last = last_attempt(run)
    if number is None:
        return last
    if last is None or not 1 <= number <= last.number:
        there = "none yet" if last is None else _span("attempt 1", f"attempt {last.number}")
        raise ConfigError(f"{run.name} has no attempt {number}; it has {there}")
    return Attempt(run, number)


def _readers(attempt: Attempt, view: View) -> list[Reader]:
    """Of the logs that `view` names, from their beginning. Raises ConfigError if the attempt has not all of them."""
    logs = {log.label: log for log in logs_of(attempt, of_nodes=view.of_nodes)}
    if not logs:
        raise ConfigError(
            f"attempt {attempt.number} of {attempt.run.name} has no launchers' logs: only a job of `python -m jobs "
            "submit` or sweep keeps them"
        )
    labels = [*logs] if view.labels is None else view.labels
    for label in labels:
        if label not in logs:
            there = _span(next(iter(logs)), [*logs][-1])
            raise ConfigError(f"attempt {attempt.number} of {attempt.run.name} has no {label}; it has {there}")
    if len(labels) == 1 and view.labels is not None:
        return [Reader(logs[label]) for label in labels]
    return _prefixed([logs[label] for label in labels])


def _prefixed(logs: Sequence[Log]) -> list[Reader]:
    """Readers whose lines are told apart."""
    width = max(len(log.label) for log in logs)
    return [Reader(log, _styled(f"{log.label:<{width}} | ", COLOURS[i % len(COLOURS)])) for i, log in enumerate(logs)]


def _missing(attempt: Attempt, readers: Sequence[Reader]) -> str:
    """What to say if there is none of the logs, else ""."""
    if any(reader.log.path.exists() for reader in readers):
        return ""
    whose = readers[0].log.label if len(readers) == 1 else "any of these"
    return (
        f"attempt {attempt.number} of {attempt.run.name} has no log of {whose}; only `python -m jobs run` keeps logs, "
        "under torchrun ranks print on its own screen"
    )


def _note(text: str) -> None:
    """A line that no rank printed."""
    sys.stdout.buffer.write(_styled(text, "dim") + b"\n")
    sys.stdout.buffer.flush()


def _styled(text: str, style: str) -> bytes:
    """`text` in `style` where standard output is a terminal, else as it is."""
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(Text(text, style=style), end="", soft_wrap=True)
    return capture.get().encode()


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"
