"""The trainer, as a table of contents: build the parts in order, loop, close."""

from functools import partial

import torch

from fnet_dist.attempt import Attempt, Progress, check_run, claim_attempt, ending
from fnet_dist.batching import Dataset
from fnet_dist.caveats import caveats
from fnet_dist.checkpoint import TrainState
from fnet_dist.config import Config, ParallelConfig
from fnet_dist.data import build_dataset
from fnet_dist.errors import ConfigError, DataError
from fnet_dist.exchange import Exchange
from fnet_dist.group import Group, agree, choose_device, gather_json, on_main, open_group
from fnet_dist.hang import HangGuard
from fnet_dist.loop import evaluate, train_epoch
from fnet_dist.loss import build_loss
from fnet_dist.manifest import build_manifest
from fnet_dist.model import build_model
from fnet_dist.optim import build_optimizer, learning_rate
from fnet_dist.record import open_record
from fnet_dist.run_dir import open_run, run_of
from fnet_dist.runtime import Runtime, tell_torchrun
from fnet_dist.sampler import GlobalBatchSampler
from fnet_dist.seeding import derive_seed, seed_device
from fnet_dist.step import Step
from fnet_dist.stopping import StopFlag, StoppedError


def train(config: Config, runtime: Runtime, stop: StopFlag) -> None:
    """Train as `config` says, as one rank of many. Raises an FnetError that all ranks agree on, or what went wrong."""
    check_batch_size(config, runtime)
    device = choose_device(config.parallel.device, runtime, torch.cuda.device_count())
    set_arithmetic(config.parallel, device)
    timeout_s = config.parallel.timeout_s
    progress = Progress()
    with (
        HangGuard(runtime.rank, timeout_s, partial(record_hang, runtime, progress)) as guard,
        open_group(runtime, device, timeout_s=20 * timeout_s) as group,
    ):
        train_data, test_data = build_data(config, group)
        config = config.model_copy(update={"data": train_data.config})
        number = on_main(group, lambda: claim_run(config, group, train_data, test_data))
        progress.attempt = Attempt(run_of(config), number) if group.is_main else None
        with ending(progress):
            fit(config, group, train_data, test_data, progress, stop, guard)


def fit(
    config: Config,
    group: Group,
    train_data: Dataset,
    test_data: Dataset,
    progress: Progress,
    stop: StopFlag,
    guard: HangGuard,
) -> None:
    """Build sampler, model and step; train each epoch and evaluate it; rank 0 writes it down."""
    sampler = GlobalBatchSampler(
        train_data,
        global_batch_size=config.data.global_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.run.seed,
        pieces=config.parallel.grad_accum_steps,
    )
    state, step = build_step(config, group, total_steps=config.run.epochs * sampler.steps_per_epoch)
    opening = [sampler.describe(train_data.name, group.device.type), *caveats(state.model, config)]
    if train_data.stand_in:
        opening.insert(0, f"WARNING: {train_data.name}")
    with open_record(config, progress, sampler.steps_per_epoch, opening) as record:
        while True:
            for window in train_epoch(step, sampler, train_data, state, stop, guard, config.run.max_steps):
                if record:
                    record.window(window)
                if window.stop:
                    raise StoppedError(state.step, window.stop)
            evaluation = evaluate(
                state.model, step.loss, test_data, group, sampler.micro_batch_size, guard.beat, state.step
            )
            if record:
                record.epoch(state, evaluation)
            if state.epoch == config.run.epochs or state.step == config.run.max_steps:
                break
            state.next_epoch()
        guard.beat("saving after step", state.step)
        if record:
            record.finish(state, evaluation, test_data)


def build_step(config: Config, group: Group, total_steps: int) -> tuple[TrainState, Step]:
    """Model, loss, optimizer and what joins them; initial weights derive from the seed, alike on all ranks."""
    seed_device(torch.device("cpu"), derive_seed(config.run.seed, "weights"))
    model = build_model(config.model).to(group.device)
    optimizer = build_optimizer(config.optim, model)
    step = Step(
        exchange=Exchange(model, group, config.parallel.numerics),
        loss=build_loss(config.loss, group.device),
        optimizer=optimizer,
        group=group,
        lr_of=lambda step: learning_rate(config.schedule, config.optim.lr, step, total_steps),
        seed=config.run.seed,
        max_grad_norm=config.optim.max_grad_norm,
        autocast=config.parallel.precision == "bf16",
    )
    return TrainState(model, optimizer), step


def build_data(config: Config, group: Group) -> tuple[Dataset, Dataset]:
    """Training and test data, the same on every rank, or one DataError on all of them."""

    def build() -> tuple[Dataset, Dataset]:
        train_data = build_dataset(config.data, "train", group.device)
        return train_data, build_dataset(train_data.config, "test", group.device)

    train_data, test_data = agree(group, build)
    weights = config.loss.class_weights
    if weights is not None and len(weights) != len(train_data.class_names):
        raise ConfigError(
            f"loss.class_weights has {len(weights)} numbers, the data {len(train_data.class_names)} classes"
        )
    found = gather_json(group, [train_data.name, train_data.sha256, test_data.sha256])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise DataError(
                f"rank {rank} has {theirs[0]} data {theirs[1][:12]}, rank 0 has {found[0][0]} data {found[0][1][:12]}; "
                "give every node the same files: --data.root, or FNET_DATA"
            )
    return train_data, test_data


def claim_run(config: Config, group: Group, train_data: Dataset, test_data: Dataset) -> int:
    """Rank 0: claim an attempt of the run that `config` names, and write what the run is made of."""
    if check_run(config) is not None:
        raise ConfigError(
            f"{run_of(config).path} was finished by another start meanwhile; start again to see its table"
        )
    attempt = claim_attempt(run_of(config), group.world_size, config.model_dump(mode="json"))
    open_run(config, build_manifest(group, train_data, test_data))
    return attempt.number


def check_batch_size(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError if a full batch would leave a rank or a piece without a sample."""
    size, pieces = config.data.global_batch_size, config.parallel.grad_accum_steps
    if size < runtime.world_size * pieces:
        raise ConfigError(
            f"data.global_batch_size {size} is smaller than {runtime.world_size} ranks x parallel.grad_accum_steps "
            f"{pieces} = {runtime.world_size * pieces}; raise --data.global-batch-size or use fewer ranks or pieces"
        )


def set_arithmetic(parallel: ParallelConfig, device: torch.device) -> None:
    """How this process computes: full float32 unless asked otherwise, denormals as zero.

    Adam's averages decay into denormals where a pixel never changes: its step then takes almost three times as long.
    """
    if parallel.precision == "tf32" and device.type != "cuda":
        raise ConfigError("parallel.precision tf32 needs a GPU, found the CPU; use --parallel.precision fp32")
    torch.backends.fp32_precision = "tf32" if parallel.precision == "tf32" else "ieee"  # type: ignore[attr-defined]  # not in torch's stubs
    torch.set_flush_denormal(True)


def record_hang(runtime: Runtime, progress: Progress, message: str) -> None:
    """Last words of a rank that hangs: torchrun's error file and, on rank 0, the run's outcome."""
    tell_torchrun(runtime, message, message)
    progress.end("failed", "hang", 1)
