"""Record a run on rank 0: the metrics log, the progress display, checkpoints, final weights and predictions."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fnet_dist.checkpoint.export import Predictions, save_best_model, save_model, save_predictions
from fnet_dist.checkpoint.saver import Saver
from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.schema import Config
from fnet_dist.distributed.stragglers import LASTING_S, RECENT_WINDOWS, StragglerStreak, detect_straggler
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import ProgressPrinter, figure
from fnet_dist.run.log import LOGGER
from fnet_dist.run.log_position import take_over_log, write_position
from fnet_dist.run.metrics_log import EpochLine, EvalLine, Line, PredictionsLine
from fnet_dist.run.outcome import RunOutcomeWriter, note_failures
from fnet_dist.run.run_dir import read_manifest
from fnet_dist.run.stop import StopFlag
from fnet_dist.tracking.client import Tracker, tracking_attempt
from fnet_dist.training.evaluation import Evaluation
from fnet_dist.training.window import Window
from fnet_dist.training.window_lines import window_lines

MAX_UNWRITTEN = 100_000  # lines kept while the disk is full, some 100 MB


@dataclass
class Recorder:
    """Rank 0's writer of everything that training produces; the other ranks have none."""

    attempt: Attempt
    printer: ProgressPrinter
    outcome: RunOutcomeWriter
    saver: Saver
    last_steps: dict[str, int]  # last step in the metrics log, of each kind of line
    test_inputs: Callable[[Tensor], Any]  # indices (n,) -> inputs of these test samples
    log_predictions: bool = False
    notes_best: bool = False  # a notice for each better evaluation
    evaluation: EvalLine | None = None  # the last one of this attempt
    unwritten: list[Line] = field(default_factory=list)  # lines that a full disk has not taken yet
    # Each rank's time for data and computation in a step, ms, in the last windows; see detect_straggler.
    busy_ms: deque[Tensor] = field(default_factory=lambda: deque(maxlen=RECENT_WINDOWS))
    streak: StragglerStreak = field(default_factory=StragglerStreak)

    def record_window(self, window: Window, state: TrainState, stop: StopFlag) -> None:
        """Log and print the steps of `window`, and save a checkpoint if one is due.

        If another process has taken over the run, write nothing and request a stop on all ranks.
        """
        if self.attempt.is_superseded:
            stop.reason = "lost_ownership"  # the other ranks see it at the end of the next window
            return
        last = window.steps[-1]
        if not window.by_rank["busy_ms"].isnan().all():  # else no step was timed, because of a profiler
            self.busy_ms.append(window.by_rank["busy_ms"])
        if last.step > self.last_steps["train"]:  # else a replay of logged steps, with the same values
            straggler = detect_straggler(self.busy_ms)
            lines = window_lines(window, self.attempt.number, straggler)
            self._write(line for line in lines if line["kind"] == "window" or line["step"] > self.last_steps["train"])
            self.last_steps["train"] = last.step
            self._note_straggler(straggler.slowest_rank, window)
        self.outcome.step, self.outcome.epoch = last.step, window.epoch
        self.printer.window(window.epoch, last.step, last.loss, window.samples_per_second)
        if window.save and self.unwritten:  # a resume from a checkpoint does not log the steps before it again
            self.saver.is_asked = False  # `fnet ask save` tells the error, and does not wait for room
        elif window.save:
            write_position(self.attempt.run, self.attempt.number, self.last_steps)
            self.saver.save(state)

    def record_evaluation(self, state: TrainState, evaluation: Evaluation, *, ends_epoch: bool) -> None:
        """Log the evaluation at this step, and keep the checkpoint of the best one if that is asked for.

        Print it, unless record_epoch will. Raise LostOwnershipError if the run was taken over.
        """
        LOGGER.debug(f"evaluated on {evaluation.count:,} samples after step {state.step:,}")
        self.attempt.check()  # before the write: a new owner may have logged it already
        self.outcome.metrics = {"loss": evaluation.loss, **evaluation.metrics}
        self.evaluation = {
            "kind": "eval",
            "step": state.step,
            "epoch": state.epoch,
            "loss": evaluation.loss,
            "metrics": evaluation.metrics,
            "count": evaluation.count,
            "seconds": evaluation.seconds,
            "attempt": self.attempt.number,
        }
        if state.step > self.last_steps["eval"]:
            if self.notes_best and state.best_step == state.step and self.last_steps["eval"] > 0:
                self._note_best(state)
            self._write([self.evaluation])
            self.last_steps["eval"] = state.step
        if not ends_epoch:
            self.printer.evaluation(self.evaluation)
        is_best = state.best_step == state.step
        if self.log_predictions and is_best:
            self._save_predictions(self.attempt.run.best_predictions, state.step, evaluation)
        if self.saver.config.keep_best and is_best and not self.unwritten:
            self.saver.save_best(state)

    def record_epoch(self, state: TrainState) -> None:
        """Log and print the epoch that `state` has finished, after its evaluation if it has one."""
        line: EpochLine = {
            "kind": "epoch",
            "epoch": state.epoch,
            "step": state.step,
            "train_loss": state.epoch_loss_sum / state.epoch_steps,
            "seconds": state.epoch_seconds,
            "samples_per_second": state.epoch_samples / state.epoch_seconds,
            "attempt": self.attempt.number,
        }
        self.attempt.check()
        if state.step > self.last_steps["epoch"]:
            self._write([line])
            self.last_steps["epoch"] = state.step
        last = self.evaluation
        self.printer.epoch(line, last if last is not None and last["step"] == state.step else None)

    def _note_straggler(self, rank: int | None, window: Window) -> None:
        """Add a notice if all windows of ten minutes name the same rank; write notices that wait for room."""
        if (notices := self.outcome.notices) is None:
            return
        notices.write()
        if (began := self.streak.add(rank, window.steps[0].step, window.seconds)) is not None:
            text = f"has waited for rank {rank} for {LASTING_S / 60:g} minutes, since step {began:,}"
            notices.add("straggler", f"straggler rank {rank} from step {began}", text, window.steps[-1].step)

    def _note_best(self, state: TrainState) -> None:
        if self.outcome.notices is not None:
            name, value = self.saver.monitor, state.best_value
            text = f"has its best {name} so far, {figure(value)} after step {state.step:,}"
            self.outcome.notices.add("best", f"best at step {state.step}", text, state.step, metric=(name, value))

    def _write(self, lines: Iterable[Line]) -> None:
        """Append `lines` to the metrics log, or keep them while the disk is full: training goes on, but no checkpoint
        is saved before the lines of its steps are written."""
        self.unwritten += lines
        try:
            self._write_unwritten()
        except OSError as error:
            run = self.attempt.run
            if len(self.unwritten) > MAX_UNWRITTEN or not run.path.exists():
                raise
            what = f"{run.metrics_log.name}, and saves no checkpoint meanwhile"
            self.saver.note_failure(self.outcome.step, what, error)
            LOGGER.warning(
                f"{run.metrics_log} not written: {error.strerror}; {len(self.unwritten):,} lines wait, "
                "and no checkpoint is saved before there is room"
            )

    def _write_unwritten(self) -> None:
        metrics_log.append(self.attempt.run.metrics_log, self.unwritten)
        self.unwritten.clear()

    def save_now(self, state: TrainState) -> None:
        """Save a checkpoint of `state` with the lines of all its steps; they are on disk when this returns."""
        self.attempt.check()
        self._write_unwritten()
        write_position(self.attempt.run, self.attempt.number, self.last_steps)
        self.saver.save_now(state)

    def save_results(self, state: TrainState, evaluation: Evaluation) -> None:
        """Save the last checkpoint, the final weights, and of a classifier the predictions that the report shows."""
        self.save_now(state)
        run = self.attempt.run
        save_model(run, state.step, run.model)
        if self.saver.config.keep_best:
            save_best_model(run)
        is_saved = self._save_predictions(run.predictions, state.step, evaluation)
        if self.log_predictions and is_saved:
            line: PredictionsLine = {
                "kind": "predictions",
                "step": state.step,
                "epoch": state.epoch,
                "best_step": state.best_step,
                "time": time.time(),
                "attempt": self.attempt.number,
            }
            self._write([line])
        if self.outcome.notices is not None:  # even if a launcher adds the other ends: the tracking process still runs
            name, value = self.saver.monitor, evaluation.value(self.saver.monitor)
            found = f"{name} {figure(value)}"
            self.outcome.notices.add_end("finished", self.outcome.finished, state.step, found, (name, value))

    def _save_predictions(self, path: Path, step: int, evaluation: Evaluation) -> bool:
        """Save a classifier's predictions to `path`; return False for another model."""
        predicted, true, losses = evaluation.predicted, evaluation.true, evaluation.losses
        if predicted is None or true is None or losses is None:
            return False
        try:
            save_predictions(path, Predictions(step, predicted, true, losses, self.test_inputs))
        except OSError as error:
            LOGGER.warning(f"{path} not written: {error.strerror}; the training goes on")
            return False
        return True


@contextmanager
def open_recorder(
    config: Config,
    outcome: RunOutcomeWriter,
    state: TrainState,
    monitor: str,
    steps_per_epoch: int,
    test_inputs: Callable[[Tensor], Any],
    tracker: Tracker | None = None,
) -> Iterator[Recorder | None]:
    """Open rank 0's Recorder; yield None on the other ranks, which hold no attempt."""
    if outcome.attempt is None:
        yield None
        return
    attempt, run = outcome.attempt, outcome.attempt.run
    outcome.step, outcome.epoch = state.step, state.epoch
    all_steps = config.run.epochs * steps_per_epoch
    last_steps = take_over_log(run)
    if last_steps["train"] > state.step:
        LOGGER.info(
            f"steps {state.step + 1:,} to {last_steps['train']:,} are logged and are trained again, as the newest "
            f"checkpoint is of step {state.step:,} (checkpoint.every_seconds is {config.checkpoint.every_seconds:g})"
        )
    run_id = read_manifest(run)["id"]
    total_steps = min(all_steps, config.run.max_steps or all_steps)
    with (
        closing(ProgressPrinter(config.run.epochs, total_steps)) as printer,
        tracking_attempt(tracker, attempt),
        note_failures(outcome),
        closing(
            Saver(attempt, config.checkpoint, run_id, steps_per_epoch, state.step, monitor, outcome.notices)
        ) as saver,
    ):
        if config.checkpoint.keep_best and 0 < state.best_step == state.step:
            saver.save_best(state)  # the kill may have come between the checkpoint and best.json
        log_predictions = config.tracking.log_predictions and config.tracking.wandb != "disabled"
        notes_best = config.tracking.alerts == "best"
        where, how = (attempt, printer, outcome, saver), (test_inputs, log_predictions, notes_best)
        yield Recorder(*where, last_steps, *how)
