"""The trainer, as a table of contents: build the parts, restore the checkpoint, train, evaluate, save."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.batch_split import check_batch_split, logical_shards
from fnet_dist.config.schema import Config
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.distributed.model_with_loss import build_model_with_loss
from fnet_dist.distributed.process_group import Group, choose_device, open_process_group, run_on_rank0, set_arithmetic
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.loss import build_loss
from fnet_dist.model import build_model
from fnet_dist.optim import build_optimizer, build_update, learning_rate
from fnet_dist.run.attempt import Attempt, heartbeat_thread
from fnet_dist.run.log import LOGGER
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import StopFlag, StoppedError, StopRequested
from fnet_dist.seeding import derive_seed, seed_device
from fnet_dist.tracking.client import Tracker, start_tracker
from fnet_dist.training.evaluation import evaluate
from fnet_dist.training.loop import StepSchedule, train_epoch
from fnet_dist.training.recorder import Recorder, open_recorder
from fnet_dist.training.reproducibility import reproducibility_warnings
from fnet_dist.training.setup import TrainTestData, build_data, claim_run, restore_checkpoint
from fnet_dist.training.step import Step
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


def train(config: Config, launch_env: LaunchEnv, stop: StopFlag) -> RunDir:
    """Train as `config` says, as one rank of many, and return the run's directory. Raise FnetErrors on all ranks."""
    check_batch_split(config, launch_env.world_size)
    device = choose_device(config.parallel.device, launch_env, torch.cuda.device_count())
    set_arithmetic(config, device)
    timeout_s = config.parallel.timeout_s
    outcome = RunOutcomeWriter(owns=launch_env.attempt is None, launch_id=launch_env.launch_id)

    def record_hang(message: str) -> None:
        write_error_file(launch_env, message, message, "hang")
        outcome.end("failed", "hang", 1)  # outcome.json, on rank 0

    with (
        Watchdog(launch_env.rank, timeout_s, record_hang) as watchdog,
        start_tracker(config.tracking, launch_env.is_rank0) as tracker,
        # Longer than the watchdog's timeout, so that the watchdog ends a hang: its message names rank and place.
        open_process_group(launch_env, device, timeout_s=20 * timeout_s) as group,
    ):
        LOGGER.debug(f"all {group.world_size} ranks are connected; this one trains on {device}")  # rank 0's first line
        data = build_data(config, group)
        config, attempt = claim_run(config, group, launch_env, data)
        outcome.attempt = attempt if group.is_rank0 else None
        with heartbeat_thread(attempt) if group.is_rank0 and outcome.owns else nullcontext(), record_outcome(outcome):
            fit(TrainingContext(config, group, attempt, data, outcome, stop, watchdog, tracker))
    return attempt.run


def fit(context: TrainingContext) -> None:
    """Build sampler, model and step, restore the newest valid checkpoint, and train; save if a stop is requested."""
    config, group, attempt, data = context.config, context.group, context.attempt, context.data
    sampler = GlobalBatchSampler(
        data.train,
        global_batch_size=config.data.global_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.run.seed,
        microbatches=config.parallel.grad_accum_steps,
        shards=logical_shards(config.parallel),
    )
    state, step = build_step(config, group, total_steps=config.run.epochs * sampler.steps_per_epoch)
    if data.train.info.is_synthetic:
        LOGGER.warning(data.train.info.name)
    LOGGER.info(sampler.describe(data.train.info.name, group.device.type))
    for warning in reproducibility_warnings(state.model, config):
        LOGGER.warning(warning)
    restore_checkpoint(state, attempt.run, group, sampler.steps_per_epoch)
    context.stop.stop_file = attempt.run.stop if group.is_rank0 else None  # one rank asks the shared disk, not all
    with open_recorder(config, context.outcome, state, sampler.steps_per_epoch, context.tracker) as recorder:
        try:
            train_all(context, step, sampler, state, recorder)
        except StopRequested as request:
            LOGGER.debug(f"all ranks stop after step {state.step:,}: {request.reason}")
            context.watchdog.extend_timeout("saving after step", state.step)
            if request.reason == "lost_ownership":  # its new owner saves
                raise attempt.lost_ownership_error() from None
            # All ranks wait until rank 0 has saved: the launcher ends the others as soon as one has ended.
            run_on_rank0(group, lambda: recorder.save_now(state) if recorder else None)
            raise StoppedError(state.step, request.reason, attempt.run) from None


def train_all(
    context: TrainingContext, step: Step, sampler: GlobalBatchSampler, state: TrainState, recorder: Recorder | None
) -> None:
    """Train and evaluate each epoch from `state` on, then save the results. Raise StopRequested on all ranks."""
    config, group, data = context.config, context.group, context.data
    stop, watchdog = context.stop, context.watchdog
    if reason := agree_to_stop(group, stop.look())[0]:
        raise StopRequested(reason)
    schedule = StepSchedule(
        config.run.max_steps,
        config.checkpoint.every_steps,
        config.parallel.hash_every_steps,
        recorder.saver.is_due if recorder else StepSchedule.save_due,
    )
    while True:
        for window in train_epoch(step, sampler, data.train, state, stop, watchdog, schedule):
            if recorder:
                recorder.record_window(window, state, stop)
            if window.stop:
                raise StopRequested(window.stop)
        batch_size = min(sampler.micro_batch_size, -(-len(data.test) // sampler.shards))  # a batch for each rank
        evaluation = evaluate(state.model, step.loss, data.test, group, batch_size, watchdog.heartbeat, state, stop)
        if recorder:
            recorder.record_epoch(state, evaluation)
        if state.epoch >= config.run.epochs or (schedule.max_steps is not None and state.step >= schedule.max_steps):
            break
        state.next_epoch()
    watchdog.extend_timeout("saving after step", state.step)
    run_on_rank0(group, lambda: recorder.save_results(state, evaluation, data.test) if recorder else None)


def build_step(config: Config, group: Group, total_steps: int) -> tuple[TrainState, Step]:
    """Build model, loss, optimizer and step; the initial weights derive from the seed, the same on all ranks."""
    # On the CPU and then moved: a GPU's random stream would give other weights.
    seed_device(torch.device("cpu"), derive_seed(config.run.seed, "weights"))
    model = build_model(config.model).to(group.device)
    loss = build_loss(config.loss, group.device)
    optimizer = build_optimizer(config.optim, model)
    forward = build_model_with_loss(model, loss, config.parallel, group.device)
    step = Step(
        gradient_sync=GradientSync(forward, group, config.parallel),
        loss=loss,
        optimizer=optimizer,
        update=build_update(optimizer),
        group=group,
        lr_of=lambda step: learning_rate(config.schedule, config.optim.lr, step, total_steps),
        seed=derive_seed(config.run.seed, "step"),
        microbatches=config.parallel.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        grad_norm_every_steps=config.tracking.log_every_steps,
    )
    return TrainState(model, optimizer), step
