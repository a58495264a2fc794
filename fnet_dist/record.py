"""What rank 0 writes down and shows: the ledger, the screen, and in the end weights and predictions."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from fnet_dist import ledger
from fnet_dist.attempt import Progress
from fnet_dist.batching import Dataset
from fnet_dist.checkpoint import TrainState, save_model, save_predictions
from fnet_dist.config import Config
from fnet_dist.console import Screen
from fnet_dist.ledger import EpochLine
from fnet_dist.loop import Evaluation
from fnet_dist.run_dir import RunDir
from fnet_dist.window import Window, window_lines

THUMBNAILS = 40


@dataclass(frozen=True)
class Record:
    """Rank 0's pen and voice; the other ranks have none."""

    run: RunDir
    attempt: int
    screen: Screen
    progress: Progress

    def window(self, window: Window) -> None:
        """The steps of a window: into the ledger, then on the screen."""
        ledger.append(self.run.ledger, window_lines(window, self.attempt))
        last = window.steps[-1]
        self.progress.step, self.progress.epoch = last.step, window.epoch
        self.screen.window(window.epoch, last.step, last.loss, window.samples_per_second)

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
            "attempt": self.attempt,
        }
        ledger.append(self.run.ledger, [line])
        self.progress.test_accuracy = evaluation.accuracy
        self.screen.epoch(line)

    def finish(self, state: TrainState, evaluation: Evaluation, test_data: Dataset) -> None:
        """The final weights, and what the report shows of the test set."""
        save_model(self.run.model, state.model)
        shown = torch.arange(min(THUMBNAILS, len(test_data)))
        inputs = test_data.batch(shown)[0].cpu()
        save_predictions(self.run.predictions, evaluation.predicted, evaluation.true, inputs, shown)


@contextmanager
def open_record(
    config: Config, progress: Progress, steps_per_epoch: int, opening: list[str]
) -> Iterator[Record | None]:
    """Rank 0's record, begun with the `opening` lines; None on the other ranks, which hold no attempt."""
    if progress.attempt is None:
        yield None
        return
    total_steps = config.run.epochs * steps_per_epoch
    if config.run.max_steps is not None:
        total_steps = min(total_steps, config.run.max_steps)
    with closing(Screen(config.run.epochs, total_steps)) as screen:
        for line in opening:
            screen.say(line)
        yield Record(progress.attempt.run, progress.attempt.number, screen, progress)
