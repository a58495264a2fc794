"""The trainer, as a table of contents: build the parts in order, go on where the run stood, loop, close."""

from contextlib import nullcontext
from functools import partial

import torch

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.config.batch_split import check_sharing, shards_of
from fnet_dist.config.schema import Config
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.gradient_sync import Exchange
from fnet_dist.distributed.launch_env import Runtime, tell_launcher
from fnet_dist.distributed.model_with_loss import build_forward
from fnet_dist.distributed.process_group import Group, choose_device, on_main, open_group, set_arithmetic
from fnet_dist.distributed.watchdog import HangGuard
from fnet_dist.loss import build_loss
from fnet_dist.model import build_model
from fnet_dist.optim import build_optimizer, build_update, learning_rate
from fnet_dist.run.attempt import Attempt, Progress, ending, kept_alive
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import AskedToStop, StopFlag, StoppedError
from fnet_dist.seeding import derive_seed, seed_device
from fnet_dist.tracking.client import Tracker, start_tracker
from fnet_dist.training.caveats import caveats
from fnet_dist.training.loop import Pace, evaluate, train_epoch
from fnet_dist.training.recorder import Record, open_record
from fnet_dist.training.setup import Data, build_data, restore, take_up
from fnet_dist.training.step import Step
from fnet_dist.training.window import agree_to_stop


def train(config: Config, runtime: Runtime, stop: StopFlag) -> RunDir:
    """Train as `config` says, as one rank of many; the run's directory.

    Raises an FnetError that all ranks agree on, or what went wrong.
    """
    check_sharing(config, runtime.world_size)
    device = choose_device(config.parallel.device, runtime, torch.cuda.device_count())
    set_arithmetic(config.parallel, device)
    if config.parallel.numerics == "invariant":  # whoever started this process, and beside how many others
        torch.set_num_threads(config.resources.cpus_per_rank)
    timeout_s = config.parallel.timeout_s
    progress = Progress(owns=runtime.attempt is None, launch_id=runtime.launch_id)
    with (
        HangGuard(runtime.rank, timeout_s, partial(record_hang, runtime, progress)) as guard,
        start_tracker(config.tracking, runtime.is_main) as tracker,
        open_group(runtime, device, timeout_s=20 * timeout_s) as group,
    ):
        data = build_data(config, group)
        config, attempt = take_up(config, group, runtime, data)
        progress.attempt = attempt if group.is_main else None
        with kept_alive(attempt) if group.is_main and progress.owns else nullcontext(), ending(progress):
            fit(config, group, attempt, data, progress, stop, guard, tracker)
    return attempt.run


def fit(
    config: Config,
    group: Group,
    attempt: Attempt,
    data: Data,
    progress: Progress,
    stop: StopFlag,
    guard: HangGuard,
    tracker: Tracker | None = None,
) -> None:
    """Build sampler, model and step; go on from the newest good checkpoint; train; save where somebody asks to stop."""
    sampler = GlobalBatchSampler(
        data.train,
        global_batch_size=config.data.global_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.run.seed,
        pieces=config.parallel.grad_accum_steps,
        shards=shards_of(config.parallel),
    )
    state, step = build_step(config, group, total_steps=config.run.epochs * sampler.steps_per_epoch)
    opening = [*data.warnings, sampler.describe(data.train.name, group.device.type), *caveats(state.model, config)]
    opening += restore(state, attempt.run, group, sampler.steps_per_epoch)
    stop.stop_file = attempt.run.stop if group.is_main else None
    with open_record(config, progress, state, sampler.steps_per_epoch, opening, tracker) as record:
        try:
            train_all(config, step, sampler, data, state, record, stop, guard)
        except AskedToStop as asked:
            guard.be_patient("saving after step", state.step)
            if asked.reason == "lost_ownership":
                raise attempt.lost() from None

            def save() -> None:
                if record:
                    record.save_now(state)

            on_main(group, save)  # nobody leaves while it is being saved
            raise StoppedError(state.step, asked.reason, attempt.run) from None


def train_all(
    config: Config,
    step: Step,
    sampler: GlobalBatchSampler,
    data: Data,
    state: TrainState,
    record: Record | None,
    stop: StopFlag,
    guard: HangGuard,
) -> None:
    """Each epoch from where `state` stands: train, evaluate; rank 0 writes it down. Raises AskedToStop on all ranks."""
    if asked := agree_to_stop(step.group, stop.look())[0]:
        raise AskedToStop(asked)
    pace = Pace(
        config.run.max_steps,
        config.checkpoint.every_steps,
        config.parallel.hash_every_steps,
        record.saver.is_due if record else Pace.save_due,
    )
    while True:
        for window in train_epoch(step, sampler, data.train, state, stop, guard, pace):
            if record:
                record.window(window, state, stop)
            if window.stop:
                raise AskedToStop(window.stop)
        batch_size = min(sampler.micro_batch_size, -(-len(data.test) // sampler.shards))  # for each rank a batch
        evaluation = evaluate(state.model, step.loss, data.test, step.group, batch_size, guard.beat, state, stop)
        if record:
            record.epoch(state, evaluation)
        if state.epoch >= config.run.epochs or (pace.max_steps is not None and state.step >= pace.max_steps):
            break
        state.next_epoch()
    guard.be_patient("saving after step", state.step)

    def finish() -> None:
        if record:
            record.finish(state, evaluation, data.test)

    on_main(step.group, finish)


def build_step(config: Config, group: Group, total_steps: int) -> tuple[TrainState, Step]:
    """Model, loss, optimizer and what joins them; initial weights derive from the seed, alike on all ranks."""
    seed_device(torch.device("cpu"), derive_seed(config.run.seed, "weights"))
    model = build_model(config.model).to(group.device)
    loss = build_loss(config.loss, group.device)
    optimizer = build_optimizer(config.optim, model)
    step = Step(
        exchange=Exchange(build_forward(model, loss, config.parallel, group.device), group, config.parallel),
        loss=loss,
        optimizer=optimizer,
        update=build_update(optimizer),
        group=group,
        lr_of=lambda step: learning_rate(config.schedule, config.optim.lr, step, total_steps),
        seed=derive_seed(config.run.seed, "step"),
        pieces=config.parallel.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        grad_norm_every_steps=config.tracking.log_every_steps,
    )
    return TrainState(model, optimizer), step


def record_hang(runtime: Runtime, progress: Progress, message: str) -> None:
    """Last words of a rank that hangs: torchrun's error file and, on rank 0, the run's outcome."""
    tell_launcher(runtime, message, message, "hang")
    progress.end("failed", "hang", 1)
