"""How a run stands, from small files and the end of its ledger: what status shows. No torch, and no file read whole."""

import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from fnet_dist.errors import FnetError, StorageError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import STALE_S, last_attempt, owner_has_exited
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import FORMAT, RunDir, RunLength, mtime, planned_length, read_json
from fnet_dist.run.stop import stop_reason
from jobs.monitor.slurm_queue import Job, RunJob

PROBE_BYTES = 1 << 16
Line = dict[str, Any]


@dataclass(frozen=True)
class State:
    """How a run stands: a word or two, for how long, and a line more. `ended`: nobody is at it, as far as one can
    tell."""

    word: str
    detail: str = ""
    ended: bool = True
    for_s: float | None = None

    @property
    def text(self) -> str:
        """For people, in one line or two."""
        lasting = "" if self.for_s is None else f" {duration(self.for_s)}"
        return f"{self.word}{lasting}" + (f"\n{self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Figures:
    """The last line of each kind in a ledger, and the mean loss over the last window's steps; None before there is."""

    train: Line | None = None
    window: Line | None = None
    epoch: Line | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Status:
    """A run at a glance. `length` is None before its data was found; `stand_in` names the data that takes the place of
    the real data, if it does; `note` says what cannot be read. `turn` is its newest Slurm job, `job` what Slurm says of
    that; `nodes` are those of the last attempt, as Slurm writes them, or its host."""

    name: str
    state: State
    figures: Figures = Figures()
    length: RunLength | None = None
    is_synthetic: str = ""
    note: str = ""
    turn: RunJob | None = None
    job: Job | None = None
    nodes: str | None = None

    @property
    def left_s(self) -> float | None:
        """Training that is left, at the last window's speed and without evaluations; None where it does not run."""
        train, window = self.figures.train, self.figures.window
        if self.state.word != "running" or self.length is None or train is None or window is None:
            return None
        return float((self.length.total_steps - train["step"]) * window["step_ms"] / 1000)


def read_status(run: RunDir) -> Status:
    """How `run` stands; one that cannot be read says so, and spoils nobody else's row."""
    try:
        manifest = read_json(run.manifest) or {}
        if (found := manifest.get("format", FORMAT)) != FORMAT:
            raise StorageError(f"{run.manifest} is of format {found}; this version reads format {FORMAT}")
        state, figures, length = read_state(run), read_figures(run.metrics_log), planned_length(run)
        data, last = manifest.get("dataset", {}), last_attempt(run)
        begin = {} if last is None else read_json(last.begin) or {}
        if state.word == "running" and last and (not figures.train or figures.train["attempt"] < last.number):
            # Not a step of this attempt yet. It writes none either while it repeats what is on record.
            state = State("resuming" if figures.train else "starting", ended=False)
        is_synthetic = data["name"] if data.get("stand_in") else ""
        return Status(run.name, state, figures, length, is_synthetic, nodes=begin.get("nodes") or begin.get("host"))
    except FnetError as error:
        note = str(error)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        note = f"{run.path} cannot be read: {type(error).__name__}: {error}"
    return Status(run.name, State("unreadable"), note=note)


def read_state(run: RunDir) -> State:
    """How the run stands, as far as files and processes tell."""
    # Owners write outcome, then end, and leave; end, process, outcome are read: no end meanwhile is taken for a death.
    last = last_attempt(run)
    if last is None:
        outcome = read_outcome(run)
        return State("no attempts") if outcome is None else _ended(outcome["status"], outcome["reason"])
    begin, end = read_json(last.begin), read_json(last.end)
    if begin is None:  # no claim leaves that
        raise StorageError(f"{last.begin} is missing")
    restarts = end is not None and end["restarts"]
    is_open = end is None or restarts
    gone = is_open and owner_has_exited(begin)
    outcome = read_outcome(run)
    if is_open and (restarts or mtime(run.outcome) < mtime(last.begin)):
        outcome = None  # it tells why this attempt failed, or still of the one before
    silent_s = time.time() - (mtime(last.end) if restarts else mtime(last.heartbeat))
    if last.is_superseded:
        return read_state(run)
    if is_open and not gone and silent_s <= STALE_S:
        if outcome is not None:
            return State("ending", ended=False)  # rank 0 has; whether its launcher starts again is not known yet
        return State("stopping" if run.stop.exists() else "restarting" if restarts else "running", ended=False)
    if outcome is not None:
        return _ended(outcome["status"], outcome["reason"])
    if gone:
        return State("gone")
    if is_open:
        return State("silent", ended=False, for_s=silent_s)
    return _ended(stop_reason(end["reason"]).status, end["reason"])  # who removed the outcome?


def read_figures(path: Path) -> Figures:
    """What the end of the ledger says; of a long one only the end is read."""

    def enough(lines: list[Line]) -> bool:
        window, train = _last(lines, "window"), next((line for line in lines if line["kind"] == "train"), None)
        return window is not None and train is not None and train["step"] <= window["first_step"]

    lines = metrics_log.tail(path, enough)
    train, window, epoch = (_last(lines, kind) for kind in ("train", "window", "epoch"))
    if train is None:
        return Figures()
    first_step = train["step"] if window is None else min(window["first_step"], train["step"])
    loss = fmean(line["loss"] for line in lines if line["kind"] == "train" and line["step"] >= first_step)
    return Figures(train, window, epoch or _epoch_before(path, train["epoch"]), loss)


def _last(lines: list[Line], kind: str) -> Line | None:
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def _epoch_before(path: Path, epoch: int) -> Line | None:
    """The line of the last epoch before number `epoch`, in which the ledger ends; None if it begins in it too.

    The train lines after it may be hundreds of MB: its place is found by halving, a line or two for each look.
    """

    def epoch_at(place: int) -> int:
        lines = metrics_log.MetricsReader(path, place).new()
        return next((line["epoch"] for line in lines if line["kind"] == "train"), epoch)

    places = range(0, path.stat().st_size, PROBE_BYTES)
    before = places[max(0, bisect_left(places, epoch, key=epoch_at) - 1)]
    lines = metrics_log.MetricsReader(path, before).new()
    return _last([*takewhile(lambda line: line["kind"] != "train" or line["epoch"] < epoch, lines)], "epoch")


def _ended(status: str, reason: str) -> State:
    return State("finished") if reason == "finished" else State(status, f"({reason})")


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are two."""
    units = ("d", 86400), ("h", 3600), ("min", 60)
    unit, size = next((each for each in units if seconds >= 2 * each[1]), ("s", 1))
    return f"{max(0, seconds) / size:,.0f} {unit}"
