"""`python -m jobs status [RUN]`: how runs stand, as tables; standing.py reads it."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fnet_dist.attempt import STALE_S, Attempt, last_attempt
from fnet_dist.run_dir import RunDir, find_run, read_json, written
from jobs.watch.standing import State, Status, duration, read_status

NONE = "–"
WATCH_EVERY_S = 2.0
NARROWEST = 76  # columns; on less a terminal folds whole lines, which is better than figures cut in two
COLOURS = {"running": "green", "finished": "green", "failed": "red", "gone": "red", "unreadable": "red"}
LEGEND = {
    "gone": "its process ended without a word, killed perhaps; the command that started the run goes on with it",
    "silent": f"its owner has shown no life for over {STALE_S:.0f} s; if it stays so, a start takes the run over",
}


def main(argv: Sequence[str]) -> int:
    """Show all runs of a root, or one with its attempts. Raises ConfigError where there is none, or not the one."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs status",
        description="State, step, loss, accuracy, speed of every run, the last active first; or RUN and its attempts.",
        epilog="loss: mean over the steps of the last window, about half a second; samples/s and slowest rank (its "
        "time over the median rank's): of that window; accuracy: on the test images, after the last epoch",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory; all runs if left out")
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="where runs are (%(default)s)")
    parser.add_argument("--watch", action="store_true", help="again every 2 s, until Ctrl-C or the end of RUN")
    asked = parser.parse_args(argv)
    root = asked.root.expanduser()
    console = Console(file=sys.stdout, highlight=False)
    if console.width < (least := NARROWEST if console.is_terminal else 1000):  # a pipe has no width
        console.width = least

    def look() -> tuple[Group, bool]:
        return all_runs(root, console) if asked.run is None else one_run(find_run(asked.run, root), console)

    if not asked.watch:
        console.print(look()[0])
    else:
        with suppress(KeyboardInterrupt):
            watch(look, console)
    return 0


def watch(look: Callable[[], tuple[Group, bool]], console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show what `look` gives again and again, until it says that this was the end."""
    shown, ended = look()  # what it raises the first time is told on an untouched screen
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
            shown, ended = look()


def all_runs(root: Path, console: Console) -> tuple[Group, bool]:
    """A table of the runs in `root`; they never end, as others may begin."""
    runs = [RunDir(path) for path in root.glob("*") if path.is_dir()]
    # Another user's run cannot be looked into; it has a row that says so.
    runs = [run for run in runs if not os.access(run.path, os.X_OK) or run.config.exists() or run.attempts.exists()]
    if not runs:
        find_run(None, root)  # says how to start one
    runs.sort(key=lambda run: max(map(written, (run.config, run.ledger, run.outcome))), reverse=True)
    found = [read_status(run) for run in runs]
    return Group(table_of(found, console), *_notes(found)), False


def one_run(run: RunDir, console: Console) -> tuple[Group, bool]:
    """A run, its attempts, and whether it has ended."""
    status = read_status(run)
    attempts: list[RenderableType] = [] if status.note else ["", attempts_of(run, status.state, console)]
    return Group(table_of([status], console), *_notes([status]), *attempts), status.state.ended


def table_of(found: Sequence[Status], console: Console) -> Table:
    """One row a run."""
    heads = ["run", "state", "step", "loss\n(window)", "test\naccuracy", "samples/s\n(window)", "slowest\nrank"]
    rows = []
    for status in found:
        figures, window = status.figures, status.figures.window or {}
        step = f"{figures.train['step']:,}" if figures.train else NONE if status.length is None else "0"
        of = f"\nof {status.length.total_steps:,}" if status.length else ""
        accuracy = _number(figures.epoch["test_accuracy"] if figures.epoch else None, 4)
        loud = "\nstand-in" if status.stand_in and figures.epoch else ""
        speed, slowest = _number(window.get("samples_per_second")), window.get("slowest_rank")
        rank = NONE if slowest is None else f"rank {slowest:,},\n{window['max_over_median']:.1f}x"
        loss = _number(figures.loss, 4)
        rows.append([status.name, status.state.text, step + of, loss, accuracy + loud, speed, rank])
    return _table(heads, rows, console, folds=0, breaks=(6, 4, 1, 2))


def attempts_of(run: RunDir, state: State, console: Console) -> Table:
    """The attempts of `run`, which is in `state`: one row each, the newest first."""
    last = last_attempt(run)
    rows = []
    for attempt in [Attempt(run, number) for number in range(last.number if last else 0, 0, -1)]:
        begin, end = read_json(attempt.begin) or {}, read_json(attempt.end)
        words = "no word\n(killed?)" if attempt.is_superseded else state.text
        if end is not None:
            words = f"{end['reason']}\n(restarted)" if end["restarts"] else end["reason"]
        step = NONE if end is None else f"{end['step']:,}"
        lasted = duration((written(attempt.alive) if end is None else end["time"]) - begin["time"]) if begin else NONE
        since, host = begin.get("since", NONE)[:19].replace(" ", "\n"), begin.get("host", NONE)
        rows.append([str(attempt.number), words, step, since, lasted, _number(begin.get("world_size")), host])
    heads = ["attempt", "end", "step", "began", "lasted", "ranks", "host"]
    return _table(heads, rows, console, folds=6, breaks=(3, 1))


def _table(heads: list[str], rows: list[list[str]], console: Console, folds: int, breaks: tuple[int, ...]) -> Table:
    """A table that cuts no figure: as far as a narrow console asks for it, the columns `breaks` break their cells at
    their newlines, one after the other, then column `folds` its words. Column 1 is how something stands, in colour."""
    for count in range(len(breaks) + 1):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for place, head in enumerate(heads):
            words = place in (0, 1, folds)
            table.add_column(Text(head), justify="left" if words else "right", no_wrap=place != folds, overflow="fold")
        for row in rows:
            cells = [cell if i in breaks[:count] else cell.replace("\n", " ") for i, cell in enumerate(row)]
            colours = [COLOURS.get(cell.split()[0], "yellow") if i == 1 else "" for i, cell in enumerate(cells)]
            table.add_row(*map(Text, cells, colours))
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            break
    return table


def _notes(found: Sequence[Status]) -> list[Text]:
    """What is to be said below the table of `found`."""
    data = dict.fromkeys(status.stand_in for status in found if status.stand_in)
    words = {status.state.text.split()[0] for status in found}
    return [
        *(Text(f"stand-in: {name}", style="bold red") for name in data),
        *(Text(f"{word}: {meaning}") for word, meaning in LEGEND.items() if word in words),
        *(Text(f"{status.name}: {status.note}") for status in found if status.note),
    ]


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
