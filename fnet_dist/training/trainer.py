"""The trainer, as a table of contents: build the parts, restore the checkpoint, train, evaluate, save."""

from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import Tensor

from fnet_dist.config.batch_split import check_batch_split, logical_shards
from fnet_dist.config.schema import Config
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.distributed.device import choose_device, set_arithmetic, visible_gpus
from fnet_dist.distributed.flight_recorder import Exchange, write_record
from fnet_dist.distributed.gpu_meter import gpu_meter
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.distributed.numa import bind_to_numa_node
from fnet_dist.distributed.process_group import open_process_group, run_on_rank0
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.errors import note_step, noted_step
from fnet_dist.run.attempt import Attempt, heartbeat_thread
from fnet_dist.run.exit import record_failure
from fnet_dist.run.log import LOGGER
from fnet_dist.run.notices import NoticeLog
from fnet_dist.run.outcome import RunOutcomeWriter, record_outcome
from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import StopFlag, StoppedError, StopRequested
from fnet_dist.tracking.client import start_tracker
from fnet_dist.training.answers import Answers
from fnet_dist.training.build import build_parts, check_parts
from fnet_dist.training.epochs import Epochs, TrainingContext
from fnet_dist.training.recorder import open_recorder
from fnet_dist.training.reproducibility import reproducibility_warnings
from fnet_dist.training.setup import build_data, claim_run, restore_checkpoint

# The watchdog ends a hang, and names rank and place. Torch's own timeouts count time in which the job was suspended.
COLLECTIVE_TIMEOUT_S = 7 * 86400.0


def train(config: Config, launch_env: LaunchEnv, stop: StopFlag) -> RunDir:
    """Train as `config` says, as one rank of many, and return the run's directory. Raise FnetErrors on all ranks."""
    check_batch_split(config, launch_env.world_size)
    device = choose_device(config.parallel.device, launch_env, visible_gpus(config, launch_env))
    set_arithmetic(config, device)
    if device.type == "cuda" and config.parallel.numa_binding and (cpus := bind_to_numa_node(device)):
        LOGGER.info(f"each rank is bound to the CPUs of its GPU's NUMA node, this one to {cpus}")
    restarts = launch_env.restart_count < launch_env.max_restarts
    outcome = RunOutcomeWriter(owns=launch_env.attempt is None, launch_id=launch_env.launch_id, restarts=restarts)

    owned: list[Attempt] = []  # by this run, once it is known

    def record_hang(message: str, exchange: Exchange | None) -> None:
        for attempt in owned:
            waits = write_record(attempt.collectives(launch_env.rank), exchange)
            if waits["waits_for"] is not None:
                message = f"{message}, waiting for rank {waits['waits_for']}"
            elif waits["last"]:
                message = f"{message}, its last collective {waits['last']}"
            for file in {launch_env.error_file, attempt.error(launch_env.rank)}:
                write_error_file(replace(launch_env, error_file=file), message, message, "hang", waits=waits)
        if not owned:
            write_error_file(launch_env, message, message, "hang", shared={"rank_at_fault": None})
        outcome.note_end("failed", "hang", message)
        outcome.end("failed", "hang", 1)  # outcome.json, on rank 0

    with (
        Watchdog(launch_env.rank, config.parallel.timeout_s, record_hang) as watchdog,
        start_tracker(config.tracking, launch_env.is_rank0) as tracker,
        open_process_group(launch_env, device, COLLECTIVE_TIMEOUT_S) as group,
    ):
        LOGGER.debug(f"all {group.world_size} ranks are connected; this one trains on {device}")  # rank 0's first line
        with closing(build_data(config, group)) as data, gpu_meter(device) as meter:
            config, attempt = claim_run(config, group, launch_env, data)
            owned.append(attempt)
            outcome.attempt = attempt if group.is_rank0 else None
            if group.is_rank0 and (launch_env.notices or config.tracking.alerts != "off"):
                outcome.notices = NoticeLog(attempt)
            beat = heartbeat_thread(attempt) if group.is_rank0 and outcome.owns else nullcontext()
            with beat, record_outcome(outcome), record_failure(launch_env, attempt):
                fit(TrainingContext(config, group, attempt, data, outcome, stop, watchdog, tracker, meter))
    return attempt.run


def fit(context: TrainingContext) -> None:
    """Build sampler, model and step, restore the newest valid checkpoint, and train; save if a stop is requested."""
    with suppress(ImportError):  # else the first backward imports it, in the first epoch's time: 0.3 s
        import_module("torch.fx.experimental.symbolic_shapes")
    config, group, attempt, data = context.config, context.group, context.attempt, context.data
    sampler = GlobalBatchSampler(
        data.train,
        global_batch_size=config.data.global_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.run.seed,
        microbatches=config.parallel.grad_accum_steps,
        shards=logical_shards(config.parallel),
        drop_last=config.data.drop_last,
        sample_weights=data.train.sample_weights,
        device=data.train.index_device,
    )
    parts = build_parts(config, group, data, sampler)
    if data.train.info.is_synthetic:
        LOGGER.warning(data.train.info.name)
    LOGGER.info(sampler.describe(data.train.info.name, group.device.type))
    for warning in reproducibility_warnings(parts.state.model, config):
        LOGGER.warning(warning)
    check_parts(parts, group, sampler)
    restore_checkpoint(parts.state, attempt.run, group, sampler.steps_per_epoch)
    context.watchdog.exchange = parts.step.gradient_sync.exchange
    context.stop.stop_file = attempt.run.stop if group.is_rank0 else None  # one rank asks the shared disk, not all
    state = parts.state

    def test_inputs(indices: Tensor) -> Any:
        return data.test.batch(indices, parts.evaluator.key)[0]

    with open_recorder(
        config, context.outcome, state, parts.monitor, sampler.steps_per_epoch, test_inputs, context.tracker
    ) as recorder:
        answers = Answers(group, context.watchdog, attempt, recorder.saver if recorder else None)
        try:
            Epochs(context, parts, sampler, recorder, answers).train()
            answers.finish(state.step)
        except StopRequested as request:
            LOGGER.debug(f"all ranks stop after step {state.step:,}: {request.reason}")
            context.watchdog.extend_timeout("saving after step", state.step)
            if request.reason == "lost_ownership":  # its new owner saves
                raise attempt.lost_ownership_error() from None
            # All ranks wait until rank 0 has saved: the launcher ends the others as soon as one has ended.
            run_on_rank0(group, lambda: recorder.save_now(state) if recorder else None)
            answers.finish(state.step)
            raise StoppedError(state.step, request.reason, attempt.run) from None
        except Exception as error:
            if noted_step(error) is None:
                note_step(error, state.step)  # twice the same after the same step: the launcher does not try again
            raise
