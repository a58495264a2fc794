"""The trainer, as a table of contents: build the parts in order, go on where the run stood, loop, close."""

from contextlib import nullcontext
from functools import partial

import torch

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.batch_split import check_batch_split, logical_shards
from fnet_dist.config.schema import Config
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gradient_sync import GradientSync
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.distributed.model_with_loss import build_model_with_loss
from fnet_dist.distributed.process_group import (
    Group,
    choose_device,
    configure_arithmetic,
    open_process_group,
    run_on_rank0,
)
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.loss import build_loss
from fnet_dist.model import build_model
from fnet_dist.optim import build_optimizer, build_update, learning_rate
from fnet_dist.run.attempt import Attempt, heartbeat_thread
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import StopFlag, StoppedError, StopRequested
from fnet_dist.seeding import derive_seed, seed_device
from fnet_dist.tracking.client import Tracker, start_tracker
from fnet_dist.training.caveats import reproducibility_warnings
from fnet_dist.training.evaluation import evaluate
from fnet_dist.training.loop import StepSchedule, train_epoch
from fnet_dist.training.recorder import Recorder, open_recorder
from fnet_dist.training.setup import TrainTestData, build_data, claim_run, restore_checkpoint
from fnet_dist.training.step import Step
from fnet_dist.training.window import agree_to_stop


def train(config: Config, launch_env: LaunchEnv, stop: StopFlag) -> RunDir:
    """Train as `config` says, as one rank of many; the run's directory.

    Raises an FnetError that all ranks agree on, or what went wrong.
    """
    check_batch_split(config, launch_env.world_size)
    device = choose_device(config.parallel.device, launch_env, torch.cuda.device_count())
    configure_arithmetic(config.parallel, device)
    if config.parallel.numerics == "invariant":  # whoever started this process, and beside how many others
        torch.set_num_threads(config.resources.cpus_per_rank)
    timeout_s = config.parallel.timeout_s
    progress = RunOutcomeWriter(owns=launch_env.attempt is None, launch_id=launch_env.launch_id)
    with (
        Watchdog(launch_env.rank, timeout_s, partial(record_hang, launch_env, progress)) as guard,
        start_tracker(config.tracking, launch_env.is_rank0) as tracker,
        open_process_group(launch_env, device, timeout_s=20 * timeout_s) as group,
    ):
        data = build_data(config, group)
        config, attempt = claim_run(config, group, launch_env, data)
        progress.attempt = attempt if group.is_rank0 else None
        with heartbeat_thread(attempt) if group.is_rank0 and progress.owns else nullcontext(), record_outcome(progress):
            fit(config, group, attempt, data, progress, stop, guard, tracker)
    return attempt.run


def fit(
    config: Config,
    group: Group,
    attempt: Attempt,
    data: TrainTestData,
    progress: RunOutcomeWriter,
    stop: StopFlag,
    guard: Watchdog,
    tracker: Tracker | None = None,
) -> None:
    """Build sampler, model and step; go on from the newest good checkpoint; train; save where somebody asks to stop."""
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
    opening = [
        *data.warnings,
        sampler.describe(data.train.info.name, group.device.type),
        *reproducibility_warnings(state.model, config),
    ]
    opening += restore_checkpoint(state, attempt.run, group, sampler.steps_per_epoch)
    stop.stop_file = attempt.run.stop if group.is_rank0 else None
    with open_recorder(config, progress, state, sampler.steps_per_epoch, opening, tracker) as record:
        try:
            train_all(config, step, sampler, data, state, record, stop, guard)
        except StopRequested as asked:
            guard.extend_timeout("saving after step", state.step)
            if asked.reason == "lost_ownership":
                raise attempt.lost_ownership_error() from None

            def save() -> None:
                if record:
                    record.save_now(state)

            run_on_rank0(group, save)  # nobody leaves while it is being saved
            raise StoppedError(state.step, asked.reason, attempt.run) from None


def train_all(
    config: Config,
    step: Step,
    sampler: GlobalBatchSampler,
    data: TrainTestData,
    state: TrainState,
    record: Recorder | None,
    stop: StopFlag,
    guard: Watchdog,
) -> None:
    """Each epoch from where `state` stands: train, evaluate; rank 0 writes it down. Raises AskedToStop on all ranks."""
    if asked := agree_to_stop(step.group, stop.look())[0]:
        raise StopRequested(asked)
    schedule = StepSchedule(
        config.run.max_steps,
        config.checkpoint.every_steps,
        config.parallel.hash_every_steps,
        record.saver.is_due if record else StepSchedule.save_due,
    )
    while True:
        for window in train_epoch(step, sampler, data.train, state, stop, guard, schedule):
            if record:
                record.window(window, state, stop)
            if window.stop:
                raise StopRequested(window.stop)
        batch_size = min(sampler.micro_batch_size, -(-len(data.test) // sampler.shards))  # for each rank a batch
        evaluation = evaluate(state.model, step.loss, data.test, step.group, batch_size, guard.heartbeat, state, stop)
        if record:
            record.epoch(state, evaluation)
        if state.epoch >= config.run.epochs or (schedule.max_steps is not None and state.step >= schedule.max_steps):
            break
        state.next_epoch()
    guard.extend_timeout("saving after step", state.step)

    def finish() -> None:
        if record:
            record.finish(state, evaluation, data.test)

    run_on_rank0(step.group, finish)


def build_step(config: Config, group: Group, total_steps: int) -> tuple[TrainState, Step]:
    """Model, loss, optimizer and what joins them; initial weights derive from the seed, alike on all ranks."""
    seed_device(torch.device("cpu"), derive_seed(config.run.seed, "weights"))
    model = build_model(config.model).to(group.device)
    loss = build_loss(config.loss, group.device)
    optimizer = build_optimizer(config.optim, model)
    step = Step(
        exchange=GradientSync(
            build_model_with_loss(model, loss, config.parallel, group.device), group, config.parallel
        ),
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


def record_hang(launch_env: LaunchEnv, progress: RunOutcomeWriter, message: str) -> None:
    """Last words of a rank that hangs: torchrun's error file and, on rank 0, the run's outcome."""
    write_error_file(launch_env, message, message, "hang")
    progress.end("failed", "hang", 1)
