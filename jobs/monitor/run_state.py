"""Read a run's state and last figures from its small files and the end of its metrics log, without torch."""

import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from fnet_dist.errors import FnetError, StorageError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import STALE_S, damage_note, last_attempt, owner_has_exited
from fnet_dist.run.metrics_log import LogPosition
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import FORMAT, RunDir, RunLength, mtime, planned_length, read_json
from fnet_dist.run.stop import stop_reason
from jobs.monitor.slurm_queue import RunJob, SlurmJob
from jobs.text import duration

PROBE_BYTES = 1 << 16  # grid of the search for an eval line: about two hundred train lines apart
Line = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A run's state: a word or two, a detail, and for how many seconds it has lasted if that matters.

    `ended` means that no process works on the run and no job of it waits, as far as is known.
    """

    word: str
    detail: str = ""
    ended: bool = True
    for_s: float | None = None

    @property
    def text(self) -> str:
        """The state as a table shows it, in one line or two."""
        lasting = "" if self.for_s is None else f" {duration(self.for_s)}"
        return f"{self.word}{lasting}" + (f"\n{self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Figures:
    """The last line of each kind in a metrics log, and the mean loss over the last window; None before the first."""

    train: Line | None = None
    window: Line | None = None
    evaluation: Line | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Status:
    """One run for the status table.

    `length` is None before the data was found. `synthetic_name` names the synthetic data that replaces the real data,
    if it does. `monitor` is the metric, or "loss", that tells the best evaluation. `note` says what cannot be
    read: all of the run if it `is_unreadable`. `run_job` is the newest Slurm job as the run directory knows it,
    `slurm_job` as Slurm does. `nodes` are those of the last attempt, as Slurm writes them, or its host.
    """

    name: str
    state: State
    figures: Figures = Figures()  # immutable, so all may share it
    length: RunLength | None = None
    synthetic_name: str = ""
    monitor: str = "accuracy"
    note: str = ""
    run_job: RunJob | None = None
    slurm_job: SlurmJob | None = None
    nodes: str | None = None

    @property
    def is_unreadable(self) -> bool:
        """True if nothing is known of the run but `note`."""
        return self.state.word == "unreadable"

    @property
    def left_s(self) -> float | None:
        """Seconds of training left at the last window's speed, without evaluations; None unless it runs."""
        train, window = self.figures.train, self.figures.window
        if self.state.word != "running" or self.length is None or train is None or window is None:
            return None
        return float((self.length.total_steps - train["step"]) * window["step_ms"] / 1000)


def read_status(run: RunDir) -> Status:
    """Return the status of `run` by its files; one that cannot be read has a note instead, and no exception."""
    try:
        manifest = read_json(run.manifest) or {}
        if (found := manifest.get("format", FORMAT)) not in (1, FORMAT):
            raise StorageError(f"{run.manifest} is of format {found}; this version reads format {FORMAT}")
        state, length = read_state(run), planned_length(run)
        every = ((read_json(run.config) or {}).get("run") or {}).get("evaluate_every_steps")
        figures = read_figures(run.metrics_log, every)
        data, last = manifest.get("dataset", {}), last_attempt(run)
        begin = {} if last is None else last.read_begin()
        if state.word == "running" and last and (not figures.train or figures.train["attempt"] < last.number):
            # No line of this attempt yet: it starts, or repeats steps that are recorded and not written again.
            state = State("resuming" if figures.train else "starting", ended=False)
        synthetic_name = data["name"] if data.get("stand_in") else ""
        monitor, nodes = manifest.get("monitor", "accuracy"), begin.get("nodes") or begin.get("host")
        return Status(run.name, state, figures, length, synthetic_name, monitor, damage_note(run), nodes=nodes)
    except FnetError as error:
        note = str(error)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        note = f"{run.path} cannot be read: {type(error).__name__}: {error}"
    return Status(run.name, State("unreadable"), note=note)


def read_state(run: RunDir) -> State:
    """Return the run's state as far as files and processes tell."""
    # An owner writes outcome.json, then end.json, then exits. Here end.json is read first, then the process looked for,
    # then outcome.json read: in any other order an end that happens in between would look like a kill.
    last = last_attempt(run)  # first, as a start may claim another meanwhile; see is_superseded below
    if last is None:
        outcome = read_outcome(run)
        return State("no attempts") if outcome is None else _ended(outcome["status"], outcome["reason"])
    end = last.read_end()
    restarts = end is not None and end["restarts"]
    is_open = end is None or restarts  # the owner may live, or begin another attempt
    gone = is_open and owner_has_exited(last)
    outcome = read_outcome(run)
    if is_open and (restarts or mtime(run.outcome) < mtime(last.begin)):
        outcome = None  # it is of an earlier attempt, or of this one, which its launcher repeats
    silent_s = time.time() - (mtime(last.end) if restarts else mtime(last.heartbeat))
    if last.is_superseded:  # claimed since the first look: what was read is of two attempts
        return read_state(run)
    if is_open and not gone and silent_s <= STALE_S:
        if outcome is not None:
            return State("ending", ended=False)  # rank 0 has ended; its launcher may still start another attempt
        return State("stopping" if run.stop.exists() else "restarting" if restarts else "running", ended=False)
    if outcome is not None:
        return _ended(outcome["status"], outcome["reason"])
    if gone:
        return State("gone")
    if is_open:
        return State("silent", ended=False, for_s=silent_s)  # on another machine: its process cannot be looked up
    assert end is not None  # else it is open
    return _ended(stop_reason(end["reason"]).status, end["reason"])  # outcome.json was removed


def read_figures(path: Path, evaluate_every_steps: int | None = None) -> Figures:
    """Return the last figures of a metrics log; only its end is read, and what is around the last evaluation."""

    def enough(lines: list[Line]) -> bool:
        window, train = _last(lines, "window"), next((line for line in lines if line["kind"] == "train"), None)
        return window is not None and train is not None and train["step"] <= window["first_step"]

    lines = metrics_log.tail(path, enough)  # of a long run, the whole has hundreds of MB
    train, window, evaluation = (_last(lines, kind) for kind in ("train", "window", "eval"))
    if train is None:
        return Figures()
    first_step = train["step"] if window is None else min(window["first_step"], train["step"])
    loss = fmean(line["loss"] for line in lines if line["kind"] == "train" and line["step"] >= first_step)
    if evaluation is None:  # it may be long ago
        every = evaluate_every_steps
        key, after = ("epoch", train["epoch"]) if every is None else ("step", train["step"] // every * every + 1)
        evaluation = _evaluation_before(path, key, after)
    return Figures(train, window, evaluation, loss)


def _last(lines: list[Line], kind: str) -> Line | None:
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def _evaluation_before(path: Path, key: str, after: int) -> Line | None:
    """Return the last eval line before the first train line whose epoch or step, `key`, is `after`; None without one.

    Hundreds of MB of train lines may follow it: bisection over byte offsets finds it with a few lines read at each.
    """

    def value_at(offset: int) -> int:
        lines = metrics_log.MetricsReader(path, LogPosition(offset)).new()
        return next((line[key] for line in lines if line["kind"] == "train"), after)

    offsets = range(0, path.stat().st_size, PROBE_BYTES)  # bisect reads only the few offsets that it compares
    before = offsets[max(0, bisect_left(offsets, after, key=value_at) - 1)]
    lines = metrics_log.MetricsReader(path, LogPosition(before)).new()
    return _last([*takewhile(lambda line: line["kind"] != "train" or line[key] < after, lines)], "eval")


def _ended(status: str, reason: str) -> State:
    return State("finished") if reason == "finished" else State(status, f"({reason})")
