"""What a start finds in its run's directory: nothing, something to go on with, the end, or another run. No torch."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import (
    STATE,
    CorruptCheckpointError,
    checkpoint_steps,
    import_checkpoint,
    read_checkpoint,
    remove_temp_dirs,
)
from fnet_dist.config.load import changed_settings
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import CheckpointError, ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt, claim_attempt, heartbeat_thread, last_attempt
from fnet_dist.run.outcome import Outcome, end_attempt, read_outcome
from fnet_dist.run.run_dir import RunDir, open_manifest, open_run, planned_length, read_json, run_dir_of

STARTS_ANEW = "never"
MUST_GO_ON = "must"


def source_of(config: Config) -> Path | None:
    """The checkpoint that a new run is to start from, where `checkpoint.resume` is a path."""
    resume = config.checkpoint.resume
    return None if resume in ("auto", MUST_GO_ON, STARTS_ANEW) else Path(resume).expanduser()


def check_run(config: Config) -> Outcome | None:
    """The outcome of the run that `config` names if there is nothing more to train; None if there is. Reads only.

    Raises ConfigError if the directory belongs to other settings, or holds nothing where going on is a must;
    CheckpointError if the checkpoint to start from is damaged.
    """
    run = run_dir_of(config)
    source = source_of(config)
    if source is not None:
        _check_source(source)
    if source is not None or config.checkpoint.resume == STARTS_ANEW:
        return None  # in a directory of its own
    steps = checkpoint_steps(run)
    if config.checkpoint.resume == MUST_GO_ON and not steps:
        raise ConfigError(f"checkpoint.resume must: no checkpoint in {run.checkpoints}; see --run.name, or use auto")
    stored = read_json(run.config)
    if stored is None:
        return None
    if changed := changed_settings(stored, config):
        from_there = f", and --checkpoint.resume {run.checkpoint(steps[0])} to start it from there" if steps else ""
        raise ConfigError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)}){_stretched(stored, config)}; use "
            f"--run.name {_free(run).name} for a new run{from_there}"
        )
    outcome = read_outcome(run)
    if outcome is not None and outcome["status"] == "finished":
        # The step that was reached counts: config.json may hold the length of a start that is still to come.
        length = planned_length(run, config.model_dump(mode="json"))
        before, now = (_length(settings["run"]) for settings in (stored, config.model_dump()))
        is_longer = now[0] > before[0] or now[1] > before[1]
        if not is_longer and (length is None or length.total_steps <= outcome["step"]):
            return outcome
    _check_end(run, config, next(iter(steps), 0))
    return None


def _check_end(run: RunDir, config: Config, saved: int) -> None:
    """Raise ConfigError if the run is to end before steps on record that are to be trained again: what is recorded of
    them stays, and would be told of the end's weights."""
    length = planned_length(run, config.model_dump(mode="json"))
    recorded = [line["step"] for line in metrics_log.tail(run.metrics_log, _has_a_step) if line["kind"] == "train"]
    if length is not None and recorded and saved < recorded[-1] and length.total_steps < recorded[-1]:
        raise ConfigError(
            f"{run.path} has recorded step {recorded[-1]:,} and goes on from step {saved:,}; it cannot end at step "
            f"{length.total_steps:,} in between: use --run.max-steps {recorded[-1]} or more, or another --run.name"
        )


def _has_a_step(lines: list[dict[str, Any]]) -> bool:
    return any(line["kind"] == "train" for line in lines)


def stopped_by_this_launch(config: Config, launch_env: LaunchEnv) -> Outcome | None:
    """How this launch's run was stopped, if torchrun is restarting a rank that only did as it was asked."""
    run = choose_run(config, launch_env)
    outcome = read_outcome(run)
    if outcome is None or outcome["status"] != "stopped":
        return None
    return outcome if launch_env.restarts(outcome["launch_id"], run.outcome.stat().st_mtime) else None


def choose_run(config: Config, launch_env: LaunchEnv) -> RunDir:
    """The directory to train in: the named one, or where a new one is asked for the first free of NAME, NAME-2, ...

    torchrun repeats a command to restart it: what this launch has begun is what it goes on with.
    """
    named = run_dir_of(config)
    if config.checkpoint.resume != STARTS_ANEW and source_of(config) is None:
        return named
    for run in _names(named):
        last = last_attempt(run)
        begin = None if last is None else read_json(last.begin)
        if not run.path.exists() or (begin is not None and launch_env.restarts(begin["launch_id"], begin["time"])):
            break
    return run


def _names(named: RunDir) -> Iterator[RunDir]:
    """NAME, NAME-2, NAME-3, ..."""
    yield named
    yield from (RunDir(named.path.with_name(f"{named.name}-{number}")) for number in count(2))


def _free(named: RunDir) -> RunDir:
    return next(run for run in _names(named) if not run.path.exists())


def start_attempt(
    config: Config, launch_env: LaunchEnv, asked: Callable[[], str] = lambda: "", **begin: Any
) -> tuple[Config, Attempt]:
    """Claim an attempt of the run that `config` asks for and write its config.json.

    Gives the config that names the run and just goes on with it: `never` and PATH act once. `begin` goes into
    begin.json. Raises ConfigError if the run is owned or was finished meanwhile, AskedToStop as claim_attempt does.
    """
    run = choose_run(config, launch_env)
    source = None if run.config.exists() else source_of(config)
    config = _as_run(config, run)
    _check_not_finished(config)
    settings = config.model_dump(mode="json")
    attempt = claim_attempt(
        run,
        asked,
        committed_step=lambda: next(iter(checkpoint_steps(run)), 0),
        launch_id=launch_env.launch_id,
        settings=settings,
        **begin,
    )
    try:
        _check_not_finished(config)  # the one that was waited for may have done it
    except ConfigError:
        end_attempt(attempt, "finished", 0, ConfigError.exit_code)
        raise
    run.outcome.unlink(missing_ok=True)  # it told of the attempt before
    with heartbeat_thread(attempt):
        remove_temp_dirs(run)
        if source is not None:
            _begin_from(source, run)
        open_run(config)
    return config, attempt


def prepare_run(config: Config) -> Config:
    """Make the directory of the run that `config` asks for and write its config.json, for a start elsewhere.

    Gives the config that names the run, as claim_run does. Nobody may be at work on it: the caller knows.
    """
    run = choose_run(config, LaunchEnv())
    source = None if run.config.exists() else source_of(config)
    config = _as_run(config, run)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.mkdir(mode=0o700, exist_ok=True)
    run.stop.unlink(missing_ok=True)  # it was meant for a start before this one
    if source is not None:
        _begin_from(source, run)
    open_run(config)
    return config


def _as_run(config: Config, run: RunDir) -> Config:
    """`config`, as it names `run` and goes on with it: `never` and PATH act once."""
    shown = config.tracking.name or config.run.name  # in W&B: the run's name, and what the command line changed
    if shown.startswith(config.run.name):
        shown = f"{run.name}{shown.removeprefix(config.run.name)}"
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": run.name}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": "auto"}),
            "tracking": config.tracking.model_copy(update={"name": shown}),
        }
    )


def _check_not_finished(config: Config) -> None:
    if check_run(config) is not None:
        raise ConfigError(
            f"{run_dir_of(config).path} was finished by another start meanwhile; start again to see its table"
        )


def _begin_from(source: Path, run: RunDir) -> None:
    """A new run's first checkpoint is a copy of `source`. Its config.json comes last: until then it is nothing."""
    open_manifest(run, {"path": str(source.absolute()), "step": read_checkpoint(source).values["step"]})
    import_checkpoint(source, run, read_json(run.manifest)["id"])


def _check_source(source: Path) -> None:
    if not (source / STATE).exists():
        raise ConfigError(
            f"checkpoint.resume {source}: no checkpoint is there; expected auto, must, never or a checkpoint's "
            "directory, like runs/NAME/checkpoints/step_00000938"
        )
    try:
        read_checkpoint(source)
    except CorruptCheckpointError as error:
        raise CheckpointError(f"checkpoint.resume: {error}; take another one") from None


def _stretched(stored: Mapping[str, Any], config: Config) -> str:
    """Why more epochs are another training, where they are."""
    before, now = stored["run"]["epochs"], config.run.epochs
    if before == now or config.schedule.name == "constant":
        return ""
    return f": schedule.name {config.schedule.name} was stretched over {before} epochs, not {now}"


def _length(run: Mapping[str, Any]) -> tuple[int, float]:
    """How long a run is to be, for comparing: its epochs, and its max_steps, where none is without end."""
    return run["epochs"], math.inf if run["max_steps"] is None else run["max_steps"]
