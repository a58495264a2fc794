"""Format the status of runs and attempts as tables that fit a narrow terminal, and the notes below them."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fnet_dist.run.attempt import STALE_S
from fnet_dist.run.console import figure
from fnet_dist.run.failure import MEANINGS
from jobs.bottleneck import describe_bottleneck
from jobs.monitor.attempts import AttemptSummary
from jobs.monitor.job_state import NOT_BEGUN, NOT_LAUNCHED
from jobs.monitor.run_state import Status
from jobs.text import NONE, describe_nodes, duration, number
from slurm.types import WAITING_STATES

MAX_NODES = 12  # characters of a node list in the table; the lines below it show it whole
MAX_ERROR = 300  # characters of an error message
MIN_NAME = 12  # columns for a run's name before a column is left out
NO_LIMIT = 10_000  # console columns: to measure how wide a table would like to be
COLOURS = {"running": "green", "finished": "green"} | dict.fromkeys(
    ("failed", "gone", "unreadable", "timeout", "node", "out"), "red"
)
LEGEND = {  # also of logs
    NOT_BEGUN: "the job ended before its first attempt; fnet logs RUN shows what its launchers printed",
    NOT_LAUNCHED: "Slurm could not write the job's output on its node (exit code 0:53), so nothing was printed; the "
    "run directory must be on a file system that nodes see, by the same path, with room on it; see scontrol show job",
    "gone": "its process was killed or ended without recording why; start it again with the same command to resume it",
    "silent": f"no heartbeat for over {STALE_S:.0f} s; if that lasts, a start can take the run over",
    "(stop_file)": "stopped by `fnet stop`; start it again with the same command to resume it",
    "(signal_usr2)": "Slurm's warning before the time limit",
    "(signal_term)": "SIGTERM, which Slurm sends at a preemption, a requeue and scancel",
    "timeout": "the time limit came before the run had stopped; submit it again to resume from the last checkpoint",
}


def table_of(statuses: Sequence[Status], console: Console) -> Table:
    """Return a table with one row a run, and a column for jobs if one of them has a Slurm job.

    On a narrow console columns may be left out: slowest rank (facts_of shows it), then speed, then loss.
    """
    monitors = {status.monitor for status in statuses if status.figures.evaluation}
    metric = f"test\n{monitors.pop()}" if len(monitors) == 1 else "test\nmetric"
    heads = ["run", "state", "step", "loss\n(window)", metric, "samples/s\n(window)", "slowest\nrank"]
    rows = [_row(status, names_metric=metric == "test\nmetric") for status in statuses]
    if not any(status.run_job for status in statuses):
        return _table(heads, rows, console, folds=0, breaks=(6, 4, 1, 2))
    columns = [*zip(heads, *rows, strict=True), ("job\nand nodes", *map(_job, statuses))]
    longest = max(len(status.name) for status in statuses)  # names may be folded, figures not
    has_slowest = any(cell != NONE for cell in columns[6][1:])
    for left_out in [()] * has_slowest + [(6,), (6, 5), (6, 5, 3)]:
        kept = [i for i in range(len(columns)) if i not in left_out]
        heads, *rows = (list(cells) for cells in zip(*(columns[i] for i in kept), strict=True))
        table = _table(heads, rows, console, folds=0, breaks=[kept.index(i) for i in (6, 7, 4, 1, 2) if i in kept])
        others = _width(table, console) - longest
        if others + min(longest, MIN_NAME) <= console.width:
            break
    return table


def _row(status: Status, names_metric: bool) -> list[str]:
    figures, window, train = status.figures, status.figures.window or {}, status.figures.train
    step = f"{train['step']:,}" if train else NONE if status.length is None else "0"
    total = f"\nof {status.length.total_steps:,}" if status.length else ""
    state = status.state.text + ("" if status.left_s is None else f"\n({duration(status.left_s)} left)")
    evaluation, metric = figures.evaluation, NONE
    if evaluation is not None:
        value = evaluation["loss"] if status.monitor == "loss" else evaluation["metrics"].get(status.monitor)
        metric = (f"{status.monitor}\n" if names_metric else "") + figure(value)
    warning = "\nsynthetic" if status.synthetic_name and evaluation else ""
    slowest = window.get("slowest_rank")
    rank = NONE if slowest is None else f"rank {slowest:,},\n{window['max_over_median']:.1f}x"
    speed = number(window.get("samples_per_second"))
    return [status.name, state, step + total, number(figures.loss, 4), metric + warning, speed, rank]


def _job(status: Status) -> str:
    if status.run_job is None:
        return NONE
    nodes = status.slurm_job.node_list if status.slurm_job else ""
    if not nodes and status.run_job.restarts is not None:
        nodes = status.nodes or ""
    return status.run_job.job_id + (f"\n{nodes}" if 0 < len(nodes) <= MAX_NODES else "")


def facts_of(status: Status, attempts: Sequence[AttemptSummary]) -> list[Text]:
    """Return the lines below one run's table: its error, epoch, slowest rank, bottleneck and newest Slurm job."""
    facts, window, train = [], status.figures.window or {}, status.figures.train
    if status.state.word == "failed" and attempts:
        error = attempts[0].message or "not known; its logs may tell"
        facts.append(f"failed: {error[:MAX_ERROR]}; the end of its logs: fnet logs {status.name}")
    if train is not None:
        epoch = f"epoch {train['epoch']:,}"
        if status.length:
            epoch += f" of {-(-status.length.total_steps // status.length.steps_per_epoch):,}"
        if status.left_s is not None:
            epoch += f", {duration(status.left_s)} of training left at {number(window['samples_per_second'])} samples/s"
        facts.append(epoch)
    if (evaluation := status.figures.evaluation) is not None:
        values = {"loss": evaluation["loss"], **evaluation["metrics"]}
        found = ", ".join(f"{name} {figure(value)}" for name, value in values.items())
        facts.append(f"test data, step {evaluation['step']:,}: {found}")
    if window.get("slowest_rank") is not None:
        ratio = window["max_over_median"]
        facts.append(f"slowest: rank {window['slowest_rank']:,}, {ratio:.1f} x the median rank's time")
    if bottleneck := describe_bottleneck([window]):
        facts.append(f"time: {bottleneck}")
    for each in attempts:
        if each.replay is not None:
            again = MEANINGS.get(each.end, MEANINGS["desync"])
            meaning = "the machine was the cause, not the data or the settings" if each.replay == "passed" else again
            facts.append(f"attempt {each.number} repeated the steps that had failed: {each.replay}: {meaning}")
    if attempts and attempts[0].excluded_nodes:
        facts.append(f"the job excludes {describe_nodes(attempts[0].excluded_nodes)}")
    if status.run_job is not None:
        facts.append(f"job {status.run_job.job_id}: {_job_text(status)}")
    return [Text(fact) for fact in facts]  # not str: rich would read "[0-1]" in a node list as markup


def _job_text(status: Status) -> str:
    job, run_job = status.slurm_job, status.run_job
    if job is None:
        return "ended" if run_job is not None and run_job.is_over else "Slurm does not know it (any more)"
    text = job.state.replace("_", " ").lower() + (f" ({job.reason})" if job.reason else "")
    if job.state in WAITING_STATES:
        return text + (f"; Slurm expects to start it at {_clock(job.expected)}" if job.expected else "")
    if job.started is not None and job.node_list:
        verb = "" if job.state == "RUNNING" else "; ran" if status.state.ended else "; runs"
        text += f"{verb} on {job.node_list} since {_clock(job.started)}"
    if job.ends is not None and status.state.ended:
        text += f"; ended at {_clock(job.ends)}"
    elif job.ends is not None:
        text += f"; its time limit is at {_clock(job.ends)}, in {duration(job.ends - time.time())}"
    return text + (f"; requeued {job.restarts} x" if job.restarts else "")


def attempts_table(attempts: Sequence[AttemptSummary], console: Console) -> Table:
    """Return a table with one row an attempt, the newest first."""
    waited = ["waited"] if any(attempt.waited_s is not None for attempt in attempts) else []
    has_jobs = len({attempt.job_id for attempt in attempts}) > 1
    where = "nodes" if any(attempt.job_id for attempt in attempts) else "host"
    heads = ["attempt", "end", "step", *waited, "began", "lasted", "ranks", where + "\nand job" * has_jobs]
    rows = []
    for attempt in attempts:
        end = attempt.end + (f"\n{attempt.detail}" if attempt.detail else "")
        times = [NONE if s is None else duration(s) for s in (attempt.waited_s, attempt.lasted_s)]
        since = NONE if attempt.since is None else attempt.since[:19].replace(" ", "\n")
        nodes = (attempt.nodes or NONE) + (f"\njob {attempt.job_id}" if has_jobs and attempt.job_id else "")
        before = [str(attempt.number), end, number(attempt.step), *times[: len(waited)]]
        rows.append([*before, since, times[1], number(attempt.ranks), nodes])
    last = len(heads) - 1
    return _table(heads, rows, console, folds=last, breaks=[last, last - 3, 1])


def _table(heads: list[str], rows: list[list[str]], console: Console, folds: int, breaks: Sequence[int]) -> Table:
    """Return a table that cuts no figure. Column 1 is the state, in colour.

    On a narrow console the columns `breaks`, as many of them as it takes, break their cells at the newlines in them;
    the words of column `folds` may be folded anywhere.
    """
    for count in range(len(breaks) + 1):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, head in enumerate(heads):
            is_text = i in (0, 1, folds) or head.startswith("job")
            table.add_column(Text(head), justify="left" if is_text else "right", no_wrap=i != folds, overflow="fold")
        for row in rows:
            cells = [cell if i in breaks[:count] else cell.replace("\n", " ") for i, cell in enumerate(row)]
            colours = [COLOURS.get(cell.split()[0], "yellow") if i == 1 else "" for i, cell in enumerate(cells)]
            table.add_row(*map(Text, cells, colours))
        if _width(table, console) <= console.width:
            break
    return table


def _width(table: Table, console: Console) -> int:  # rich measures within the console's width otherwise
    return console.measure(table, options=console.options.update(width=NO_LIMIT)).maximum


def notes_of(statuses: Sequence[Status], slurm_note: str) -> list[Text]:
    """Return the notes below a table; `slurm_note` says why Slurm gave no answer, or is ""."""
    names = dict.fromkeys(status.synthetic_name for status in statuses if status.synthetic_name)
    words = {word for status in statuses for word in (status.state.word, status.state.detail)}
    return [
        *(Text(f"test figures are on {name}", style="bold red") for name in names),
        *(Text(f"{word.strip('()')}: {meaning}") for word, meaning in LEGEND.items() if word in words),
        *(Text(f"{status.name}: {status.note}") for status in statuses if status.note),
        *([Text(slurm_note)] if slurm_note else []),
    ]


def _clock(seconds: float) -> str:
    """Return Unix time as the local time of day, with the date unless it is today's."""
    local = time.localtime(seconds)  # the reader's time zone; JSON has Unix time
    is_today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", local)
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", local)
