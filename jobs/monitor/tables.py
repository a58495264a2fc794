"""How runs and their attempts stand, as tables that fit a narrow screen, and what is said below them."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fnet_dist.run.attempt import STALE_S
from jobs.monitor.attempts import AttemptSummary
from jobs.monitor.job_state import NOT_BEGUN
from jobs.monitor.run_state import Line, Status, duration
from jobs.monitor.slurm_queue import WAITING

NONE = "–"
LONGEST_NODES = 12  # characters of a list of nodes
LONGEST_WHY = 300  # characters of an error
LEAST_NAME = 12  # columns
COLOURS = {"running": "green", "finished": "green"} | dict.fromkeys(
    ("failed", "gone", "unreadable", "timeout", "node", "out"), "red"
)
LEGEND = {
    NOT_BEGUN: "the job ended before its first attempt; python -m jobs logs RUN shows what its launchers said",
    "gone": "its process ended without a word, killed perhaps; the command that started the run goes on with it",
    "silent": f"its owner has shown no life for over {STALE_S:.0f} s; if it stays so, a start takes the run over",
    "(stop_file)": "asked to stop by `python -m jobs stop`; the command that started the run goes on with it",
    "(signal_usr2)": "Slurm's warning before the time limit",
    "(signal_term)": "asked to end: Slurm sends it at a preemption, a requeue and scancel",
    "timeout": "its time limit came before it had stopped; the same submit goes on from the last checkpoint",
}


def table_of(found: Sequence[Status], console: Console) -> Table:
    """One row a run; where one is Slurm's, with a column for jobs. On a narrow screen that may be at the expense of the
    slowest rank, which is among the facts of one run, then of speed and loss."""
    heads = ["run", "state", "step", "loss\n(window)", "test\naccuracy", "samples/s\n(window)", "slowest\nrank"]
    rows = [_row(status) for status in found]
    if not any(status.turn for status in found):
        return _table(heads, rows, console, folds=0, breaks=(6, 4, 1, 2))
    columns = [*zip(heads, *rows, strict=True), ("job\nand nodes", *map(_job, found))]
    longest = max(len(status.name) for status in found)
    there_is = any(cell != NONE for cell in columns[6][1:])
    for left_out in [()] * there_is + [(6,), (6, 5), (6, 5, 3)]:
        kept = [i for i in range(len(columns)) if i not in left_out]
        heads, *rows = (list(cells) for cells in zip(*(columns[i] for i in kept), strict=True))
        table = _table(heads, rows, console, folds=0, breaks=[kept.index(i) for i in (6, 7, 4, 1, 2) if i in kept])
        others = console.measure(table, options=console.options.update(width=10_000)).maximum - longest
        if others + min(longest, LEAST_NAME) <= console.width:
            break
    return table


def _row(status: Status) -> list[str]:
    figures, window, train = status.figures, status.figures.window or {}, status.figures.train
    step = f"{train['step']:,}" if train else NONE if status.length is None else "0"
    of = f"\nof {status.length.total_steps:,}" if status.length else ""
    state = status.state.text + ("" if status.left_s is None else f"\n({duration(status.left_s)} left)")
    accuracy = _number(figures.epoch["test_accuracy"] if figures.epoch else None, 4)
    loud = "\nstand-in" if status.is_synthetic and figures.epoch else ""
    speed, slowest = _number(window.get("samples_per_second")), window.get("slowest_rank")
    rank = NONE if slowest is None else f"rank {slowest:,},\n{window['max_over_median']:.1f}x"
    return [status.name, state, step + of, _number(figures.loss, 4), accuracy + loud, speed, rank]


def _job(status: Status) -> str:
    if status.turn is None:
        return NONE
    nodes = (status.job and status.job.node_list) or status.nodes
    if status.turn.restarts is None and not (status.job and status.job.node_list):
        return status.turn.job_id
    return status.turn.job_id + (f"\n{nodes}" if nodes and len(nodes) <= LONGEST_NODES else "")


def facts_of(status: Status, past: Sequence[AttemptSummary]) -> list[Text]:
    """What a table has no room for, of one run: why it failed, epoch, time left, slowest rank, its newest Slurm job."""
    facts, window = [], status.figures.window or {}
    if status.figures.train is not None:
        epoch = f"epoch {status.figures.train['epoch']:,}"
        if status.length:
            epoch += f" of {-(-status.length.total_steps // status.length.steps_per_epoch):,}"
        left = "" if status.left_s is None else f", {duration(status.left_s)} of training left at {_speed(window)}"
        facts.append(epoch + left)
    if window.get("slowest_rank") is not None:
        facts.append(
            f"slowest: rank {window['slowest_rank']:,}, {window['max_over_median']:.1f} x the median rank's time"
        )
    if status.state.word == "failed" and past:
        why = past[0].message or "not known; its logs may tell"
        facts.insert(0, f"failed: {why[:LONGEST_WHY]}; the end of its logs: python -m jobs logs {status.name}")
    if status.turn is not None:
        facts.append(f"job {status.turn.job_id}: {_slurm_says(status)}")
    return [Text(fact) for fact in facts]


def _speed(window: Line) -> str:
    return f"{_number(window.get('samples_per_second'))} samples/s"


def _slurm_says(status: Status) -> str:
    job, turn = status.job, status.turn
    if job is None:
        return "ended" if turn is not None and turn.is_over else "Slurm does not know it (any more)"
    words = job.state.replace("_", " ").lower() + (f" ({job.reason})" if job.reason else "")
    if job.state in WAITING:
        expected = f"; Slurm expects to start it at {_clock(job.expected)}" if job.expected else ""
        return words + expected
    if job.started is not None and job.node_list:
        ran = "" if job.state == "RUNNING" else "; ran" if status.state.ended else "; runs"
        words += f"{ran} on {job.node_list} since {_clock(job.started)}"
    if job.ends is not None and status.state.ended:
        words += f"; ended at {_clock(job.ends)}"
    elif job.ends is not None:
        words += f"; its time limit is at {_clock(job.ends)}, in {duration(job.ends - time.time())}"
    return words + (f"; requeued {job.restarts} x" if job.restarts else "")


def attempts_table(past: Sequence[AttemptSummary], console: Console) -> Table:
    """One row an attempt, the newest first."""
    heads = ["attempt", "end", "step", "began", "lasted", "ranks", "nodes" if any(p.job_id for p in past) else "host"]
    rows = []
    for attempt in past:
        end = attempt.end + (f"\n{attempt.detail}" if attempt.detail else "")
        since = NONE if attempt.since is None else attempt.since[:19].replace(" ", "\n")
        lasted = NONE if attempt.lasted_s is None else duration(attempt.lasted_s)
        step, ranks = _number(attempt.step), _number(attempt.ranks)
        rows.append([str(attempt.number), end, step, since, lasted, ranks, attempt.nodes or NONE])
    if any(attempt.waited_s is not None for attempt in past):
        heads.insert(3, "waited")
        for row, attempt in zip(rows, past, strict=True):
            row.insert(3, NONE if attempt.waited_s is None else duration(attempt.waited_s))
    last = len(heads) - 1
    if len({attempt.job_id for attempt in past}) > 1:
        heads[last] += "\nand job"
        for row, attempt in zip(rows, past, strict=True):
            row[last] += f"\njob {attempt.job_id}" if attempt.job_id else ""
    return _table(heads, rows, console, folds=last, breaks=[last, last - 3, 1])


def _table(heads: list[str], rows: list[list[str]], console: Console, folds: int, breaks: Sequence[int]) -> Table:
    """A table that cuts no figure: as far as a narrow console asks for it, the columns `breaks` break their cells at
    their newlines, one after the other, then column `folds` its words. Column 1 is how something stands, in
    colour."""
    for count in range(len(breaks) + 1):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for place, head in enumerate(heads):
            words = place in (0, 1, folds) or head.startswith("job")
            table.add_column(Text(head), justify="left" if words else "right", no_wrap=place != folds, overflow="fold")
        for row in rows:
            cells = [cell if i in breaks[:count] else cell.replace("\n", " ") for i, cell in enumerate(row)]
            colours = [COLOURS.get(cell.split()[0], "yellow") if i == 1 else "" for i, cell in enumerate(cells)]
            table.add_row(*map(Text, cells, colours))
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            break
    return table


def notes_of(found: Sequence[Status], slurm: str) -> list[Text]:
    """What is to be said below the table of `found`; `slurm` is why Slurm gave no answer, or ""."""
    data = dict.fromkeys(status.is_synthetic for status in found if status.is_synthetic)
    words = {word for status in found for word in (status.state.word, status.state.detail)}
    return [
        *(Text(f"stand-in: {name}", style="bold red") for name in data),
        *(Text(f"{word.strip('()')}: {meaning}") for word, meaning in LEGEND.items() if word in words),
        *(Text(f"{status.name}: {status.note}") for status in found if status.note),
        *([Text(slurm)] if slurm else []),
    ]


def _clock(seconds: float) -> str:
    """A moment, without its date where it is today's."""
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", time.localtime(seconds))
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", time.localtime(seconds))


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
