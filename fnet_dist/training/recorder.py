"""What rank 0 writes down and shows: the ledger, the screen, checkpoints, and in the end weights and predictions."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch

from fnet_dist.checkpoint.export import save_model, save_predictions
from fnet_dist.checkpoint.saver import Saver
from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed import skew
from fnet_dist.distributed.skew import NO_STRAGGLER, Straggler
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.console import ProgressPrinter
from fnet_dist.run.metrics_log import MAX_RANK_CURVES, EpochLine, Line, loss_extremes
from fnet_dist.run.outcome import RunOutcomeWriter
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import StopFlag
from fnet_dist.tracking.client import Tracker, tracking_attempt
from fnet_dist.training.evaluation import Evaluation
from fnet_dist.training.window import Window

THUMBNAILS = 40
MOST_WAITING = 100_000  # lines, some 100 MB


@dataclass
class Recorder:
    """Rank 0's pen and voice; the other ranks have none.

    `recorded` is the last step of each kind in the ledger; `waiting` are lines that a full disk has not taken yet;
    `own_ms` are the last windows' own times of each rank, ms.
    """

    attempt: Attempt
    screen: ProgressPrinter
    progress: RunOutcomeWriter
    saver: Saver
    every_steps: int
    recorded: dict[str, int]
    waiting: list[Line] = field(default_factory=list)
    compute_ms: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=skew.RECENT_WINDOWS))

    @property
    def run(self) -> RunDir:
        return self.attempt.run

    def window(self, window: Window, state: TrainState, stop: StopFlag) -> None:
        """The steps of a window: into the ledger, on the screen, and if one is due into a checkpoint.

        Steps on record already are a replay, and have the same values. If the run is another's by now, nothing more is
        written, and all ranks are asked to leave.
        """
        if self.attempt.is_superseded:
            stop.reason = "lost_ownership"
            return
        last = window.steps[-1]
        self.compute_ms.append(window.compute_ms)
        if last.step > self.recorded["train"]:
            lines = window_lines(window, self.attempt.number, self.every_steps, skew.detect_straggler(self.compute_ms))
            self._write(line for line in lines if line["kind"] == "window" or line["step"] > self.recorded["train"])
            self.recorded["train"] = last.step
        self.progress.step, self.progress.epoch = last.step, window.epoch
        self.screen.window(window.epoch, last.step, last.loss, window.samples_per_second)
        if window.save and not self.waiting:
            self.saver.save(state)

    def epoch(self, state: TrainState, evaluation: Evaluation) -> None:
        """The epoch that `state` has just been through."""
        line: EpochLine = {
            "kind": "epoch",
            "epoch": state.epoch,
            "step": state.step,
            "train_loss": state.epoch_loss_sum / state.epoch_steps,
            "test_loss": evaluation.loss,
            "test_accuracy": evaluation.accuracy,
            "test_correct": evaluation.correct,
            "test_count": evaluation.count,
            "seconds": state.epoch_seconds,
            "samples_per_second": state.epoch_samples / state.epoch_seconds,
            "attempt": self.attempt.number,
        }
        self.attempt.check()
        if state.step > self.recorded["epoch"]:
            self._write([line])
            self.recorded["epoch"] = state.step
        self.progress.test_accuracy = evaluation.accuracy
        self.screen.epoch(line)

    def save_now(self, state: TrainState) -> None:
        """A checkpoint of `state`, on disk when this returns, with the lines of all its steps."""
        self.attempt.check()
        metrics_log.append(self.run.metrics_log, self.waiting)
        self.waiting.clear()
        self.saver.save_now(state)

    def _write(self, lines: Iterable[Line]) -> None:
        """Append `lines` to the ledger. A disk that is full for a while stops nothing: they wait, and no checkpoint is
        saved before they are written."""
        self.waiting += lines
        try:
            metrics_log.append(self.run.metrics_log, self.waiting)
            self.waiting.clear()
        except OSError as error:
            if len(self.waiting) > MOST_WAITING or not self.run.path.exists():
                raise
            self.screen.say(
                f"WARNING: {self.run.metrics_log} not written: {error.strerror}; {len(self.waiting):,} lines wait, "
                "and no checkpoint is saved before there is room"
            )

    def finish(self, state: TrainState, evaluation: Evaluation, test_data: Dataset) -> None:
        """The last checkpoint, the final weights, and what the report shows of the test set."""
        self.save_now(state)
        save_model(self.run.model, state.model)
        shown = torch.arange(min(THUMBNAILS, len(test_data)))
        inputs = test_data.batch(shown)[0].cpu()
        save_predictions(self.run.predictions, evaluation.predicted, evaluation.true, inputs, shown)


@contextmanager
def open_recorder(
    config: Config,
    progress: RunOutcomeWriter,
    state: TrainState,
    steps_per_epoch: int,
    opening: list[str],
    tracker: Tracker | None = None,
) -> Iterator[Recorder | None]:
    """Rank 0's record, begun with the `opening` lines; None on the other ranks, which hold no attempt."""
    if progress.attempt is None:
        yield None
        return
    attempt, run = progress.attempt, progress.attempt.run
    progress.step, progress.epoch = state.step, state.epoch
    total_steps = config.run.epochs * steps_per_epoch
    if config.run.max_steps is not None:
        total_steps = min(total_steps, config.run.max_steps)
    metrics_log.truncate_torn_line(run.metrics_log)
    recorded = metrics_log.last_steps(run.metrics_log)
    if recorded["train"] > state.step:
        opening = [*opening, f"steps {state.step + 1:,} to {recorded['train']:,} are on record and are trained again"]
    run_id = read_json(run.manifest)["id"]
    with closing(ProgressPrinter(config.run.epochs, total_steps)) as screen:
        for line in opening:
            screen.say(line)
        with (
            tracking_attempt(tracker, attempt, screen.say),
            closing(Saver(attempt, config.checkpoint, run_id, steps_per_epoch, state.step, screen.say)) as saver,
        ):
            yield Recorder(attempt, screen, progress, saver, config.tracking.log_every_steps, recorded)


def window_lines(window: Window, attempt: int, every_steps: int, skew: Straggler = NO_STRAGGLER) -> list[Line]:
    """The window's lines for the ledger: one for each step, its hashes if it has any, then its own, with what is said
    of the ranks' times.

    Of many ranks only each step of the grid of `every_steps`, W&B's, has all their losses.
    """
    everywhere = window.world_size <= MAX_RANK_CURVES
    nothing = (None, None, None)
    lines: list[Line] = [
        {
            "kind": "train",
            "step": one.step,
            "epoch": window.epoch,
            "samples": one.samples,
            "loss": one.loss,
            "loss_per_rank": list(one.loss_per_rank) if everything else None,
            "loss_min": least,
            "loss_max": most,
            "worst_rank": worst_rank,
            "lr": one.lr,
            "grad_norm": one.grad_norm,
            "time": one.time,
            "attempt": attempt,
        }
        for one in window.steps
        for everything in [everywhere or one.step % every_steps == 0]
        for least, most, worst_rank in [nothing if everything else loss_extremes(one.loss_per_rank)]
    ]
    if window.hashes is not None:
        lines.append(
            {"kind": "hash", "step": window.steps[-1].step, "weights": window.hashes, "attempt": attempt},
        )
    lines.append(
        {
            "kind": "window",
            "first_step": window.steps[0].step,
            "last_step": window.steps[-1].step,
            "time": time.time(),
            "samples_per_second": window.samples_per_second,
            "step_ms": 1000 * window.seconds / len(window.steps),
            "slowest_rank": skew.slowest_rank,
            "max_over_median": skew.max_over_median,
            "max_memory_gib": window.max_memory_gib,
            "world_size": window.world_size,
            "attempt": attempt,
        }
    )
    return lines
