"""Go through the epochs of a run: train, evaluate, keep the best, end."""

from dataclasses import dataclass

from fnet_dist.config.schema import Config
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gpu_meter import GpuMeter
from fnet_dist.distributed.process_group import Group, run_on_rank0
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.log import LOGGER
from fnet_dist.run.metrics_log import is_better
from fnet_dist.run.outcome import RunOutcomeWriter
from fnet_dist.run.stop import StopFlag, StopRequested
from fnet_dist.tracking.client import Tracker
from fnet_dist.training.answers import Answers
from fnet_dist.training.build import Parts
from fnet_dist.training.evaluation import Evaluation, evaluate
from fnet_dist.training.loop import StepSchedule, is_due, train_epoch
from fnet_dist.training.recorder import Recorder
from fnet_dist.training.setup import TrainTestData
from fnet_dist.training.window import agree_to_stop


@dataclass(frozen=True)
class TrainingContext:
    """One rank's part in an attempt at a run: everything that is settled before the model is built."""

    config: Config
    group: Group
    attempt: Attempt
    data: TrainTestData
    outcome: RunOutcomeWriter
    stop: StopFlag
    watchdog: Watchdog
    tracker: Tracker | None = None
    gpu_meter: GpuMeter | None = None


@dataclass(frozen=True)
class Epochs:
    """The way through all epochs, from the state restored to the results. Rank 0 has a recorder."""

    context: TrainingContext
    parts: Parts
    sampler: GlobalBatchSampler
    recorder: Recorder | None
    answers: Answers

    def train(self) -> None:
        """Train and evaluate each epoch, then save the results. Raise StopRequested on all ranks."""
        context, state = self.context, self.parts.state
        if reason := agree_to_stop(context.group, context.stop.look())[0]:
            raise StopRequested(reason)
        if self._is_evaluated_here() and state.epoch_steps < self.sampler.steps_per_epoch:
            self._evaluate(ends_epoch=False)  # the checkpoint was saved before this evaluation
        while True:
            self._train_epoch()
            evaluation = None
            ends = self._is_over() or self._is_out_of_patience()
            if context.config.run.evaluate_every_steps is None or self._is_evaluated_here() or ends:
                # A run that ends needs one for its predictions, also if this step has been counted already.
                evaluation = self._evaluate(ends_epoch=True)
            if self.recorder:
                self.recorder.record_epoch(state)
            if ends or self._is_out_of_patience():
                break
            state.next_epoch()
        if not self._is_over():
            LOGGER.info(f"{self.parts.monitor} is not better since step {state.best_step:,}: run.patience ends the run")
            context.outcome.finished = "patience"
        context.watchdog.extend_timeout("saving after step", state.step)
        assert evaluation is not None  # the run has ended with one
        last, recorder = evaluation, self.recorder
        run_on_rank0(context.group, lambda: recorder.save_results(state, last) if recorder else None)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch or of the run, with the evaluations that are due on the way."""
        context, state, step = self.context, self.parts.state, self.parts.step
        run, saver = context.config.run, None if self.recorder is None else self.recorder.saver
        schedule = StepSchedule(
            run.max_steps,
            context.config.checkpoint.every_steps,
            context.config.parallel.hash_every_steps,
            run.evaluate_every_steps,
            StepSchedule.save_due if saver is None else saver.is_due,
        )
        train_data, stop, watchdog, meter = context.data.train, context.stop, context.watchdog, context.gpu_meter
        if self._is_out_of_patience():
            return
        for window in train_epoch(step, self.sampler, train_data, state, stop, watchdog, schedule, meter, self.answers):
            if self.recorder:
                self.recorder.record_window(window, state, stop)
            if window.stop:
                raise StopRequested(window.stop)
            if is_due(run.evaluate_every_steps, state.step) and state.epoch_steps < self.sampler.steps_per_epoch:
                if run.max_steps is None or state.step < run.max_steps:
                    self._evaluate(ends_epoch=False)
                if self._is_out_of_patience():
                    return

    def _evaluate(self, *, ends_epoch: bool) -> Evaluation:
        """Evaluate at this step; all ranks know the same values, so that each can decide which is the best."""
        context, state, monitor = self.context, self.parts.state, self.parts.monitor
        evaluation = evaluate(self.parts.evaluator, context.watchdog.heartbeat, state, context.stop)
        value = evaluation.value(monitor)
        state.count_evaluation(value, is_better=is_better(value, state.best_value, self.parts.directions[monitor]))
        if self.recorder:
            self.recorder.record_evaluation(state, evaluation, ends_epoch=ends_epoch)
        return evaluation

    def _is_evaluated_here(self) -> bool:
        """Return True if an evaluation is due at this step that has not been counted."""
        state, every = self.parts.state, self.context.config.run.evaluate_every_steps
        return 0 < state.step != state.evaluated_step and is_due(every, state.step)

    def _is_over(self) -> bool:
        state, run = self.parts.state, self.context.config.run
        return (state.epoch >= run.epochs and state.epoch_steps >= self.sampler.steps_per_epoch) or (
            run.max_steps is not None and state.step >= run.max_steps
        )

    def _is_out_of_patience(self) -> bool:
        patience = self.context.config.run.patience
        return patience is not None and self.parts.state.not_better >= patience
