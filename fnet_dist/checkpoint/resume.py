"""Decide what a start does with its run's directory: begin, resume, show a finished run, or refuse. No torch here.

`check_run` reads only, and refuses what cannot work before anything is written. `start_attempt` claims an attempt and
writes config.json. The checkpoint itself is loaded later, by fnet_dist/training/setup.py on every rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.storage import (
    NO_EVALUATION,
    STATE,
    CheckpointBytes,
    CorruptCheckpointError,
    checkpoint_steps,
    id_of_checkpoints,
    newest_step,
    read_checkpoint,
    remove_temp_dirs,
    save_checkpoint,
)
from fnet_dist.config.load import changed_settings, read_section
from fnet_dist.config.load_recipe import load_recipe
from fnet_dist.config.schema import Config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import CheckpointError, ConfigError
from fnet_dist.processes import quoted
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import (
    Attempt,
    begun_settings,
    claim_attempt,
    damage_note,
    heartbeat_thread,
    is_alive,
    last_attempt,
    restore_config,
)
from fnet_dist.run.console import command_for, next_commands
from fnet_dist.run.log import LOGGER
from fnet_dist.run.outcome import Outcome, read_outcome
from fnet_dist.run.run_dir import (
    RunDir,
    mtime,
    open_manifest,
    open_run,
    planned_length,
    read_json,
    read_manifest,
    run_dir_of,
    write_json,
)
from fnet_dist.run.sharing import make_run_dir, other_owner, share_files
from fnet_dist.run.stop import StoppedError

_OLD_WORDS = {"must": "required", "never": "new"}  # of checkpoint.resume, in job files and scripts from before 2026-12


def resume_mode(config: Config) -> str:
    """Return `checkpoint.resume`: auto, required, new, or a path; an old word is replaced by the new one."""
    return _OLD_WORDS.get(config.checkpoint.resume, config.checkpoint.resume)


def old_word_note(config: Config) -> str | None:
    """Return a line that names the new word, if `checkpoint.resume` is an old one."""
    old = config.checkpoint.resume
    return f"note: checkpoint.resume {old} is now called {_OLD_WORDS[old]}" if old in _OLD_WORDS else None


def source_of(config: Config) -> Path | None:
    """Return the checkpoint that a new run starts from, if `checkpoint.resume` is a path."""
    mode = resume_mode(config)
    return None if mode in ("auto", "required", "new") else Path(mode).expanduser()


def starts_new_run(config: Config) -> bool:
    """Return True if each start begins a run of its own: NAME, NAME-2, ..."""
    return resume_mode(config) not in ("auto", "required")


def check_run(config: Config) -> Outcome | None:
    """Return the outcome of the run that `config` names if it is finished; None if there is something to train.

    Raise ConfigError if the directory holds a run with other settings, or no checkpoint is where one is required.
    """
    run, source = run_dir_of(config), source_of(config)
    if source is not None and not (source / STATE).exists():  # the start reads it once, and verifies it then
        raise ConfigError(
            f"checkpoint.resume {source}: no checkpoint is there; expected auto, required, new or a checkpoint's "
            "directory, like runs/NAME/checkpoints/step_00000938"
        )
    if starts_new_run(config) or _is_outdated(run, config):
        return None
    steps = checkpoint_steps(run)
    if resume_mode(config) == "required" and not steps:
        raise ConfigError(
            f"checkpoint.resume required: no checkpoint in {run.checkpoints}; see --run.name, or use auto"
        )
    stored = read_json(run.config) or begun_settings(run)
    if stored is None:
        return None
    if changed := changed_settings(stored, config):
        free = next(other for other in _names(run) if not other.path.exists())
        from_there = (
            f", and --checkpoint.resume {quoted(run.checkpoint(steps[0]))} to start it from there" if steps else ""
        )
        raise ConfigError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)}){_stretched(stored, config)}; use "
            f"--run.name {free.name} for a new run{from_there}"
        )
    outcome, length = read_outcome(run), planned_length(run, config.model_dump(mode="json"))
    if outcome is not None and outcome["status"] == "finished":
        before, now = stored["run"], config.run
        more_epochs = now.epochs > before["epochs"]
        more_steps = (now.max_steps or math.inf) > (before["max_steps"] or math.inf)
        # config.json alone does not decide: `fnet submit` writes the new length before any rank has trained it.
        is_reached = length is None or length.total_steps <= outcome["step"]
        if outcome["reason"] == "patience":
            if (now.patience or math.inf) <= (before.get("patience") or math.inf):
                return outcome
        elif is_reached and not more_epochs and not more_steps:
            return outcome
    if length is not None:
        _check_end(run, length.total_steps)
    return None


def finished_note(config: Config) -> str:
    """Return what to say of the run that `config` names, which is finished.

    Tracking settings that `config` gives and that differ are written to config.json: the next `fnet sync` uses them.
    """
    run, lines = run_dir_of(config), list[str]()
    restore_config(run)
    stored, given = read_section(run.config, "tracking"), config.tracking.model_fields_set
    tracking = stored.model_copy(update={name: getattr(config.tracking, name) for name in given})
    if tracking != stored and other_owner(run) is None:
        share_files(run.path)
        write_json(run.config, {**read_json(run.config), "tracking": tracking.model_dump(mode="json")})
        lines.append(f"tracking settings changed; to send the run with them: {command_for(run, 'sync')}")
    return "\n".join(["finished before: nothing is trained now", *lines, next_commands(run, config.recipe)])


def _is_outdated(run: RunDir, config: Config) -> bool:
    """Return True if `run` was trained on synthetic data for want of the real data, which is there now."""
    dataset, recipe = (read_json(run.manifest) or {}).get("dataset") or {}, load_recipe(config.recipe)
    return bool(dataset.get("stand_in")) and hasattr(recipe, "has_real_data") and recipe.has_real_data(config.data)


def rename_outdated(config: Config) -> None:
    """Give the run that `config` names another name if the real data has come since, and say so."""
    run = run_dir_of(config)
    if starts_new_run(config) or not _is_outdated(run, config):
        return
    if (last := last_attempt(run)) is not None and is_alive(last):  # claim_attempt names its owner
        return
    free = next(
        other for other in _names(RunDir(run.path.with_name(f"{run.name}-synthetic"))) if not other.path.exists()
    )
    run.path.rename(free.path)
    LOGGER.warning(f"the real data is there now: {run.name} trains on it; the run on synthetic data is {free.name} now")


def _check_end(run: RunDir, end: int) -> None:
    """Raise ConfigError if `end` is before steps in the metrics log, which would then not match the final weights."""
    lines = metrics_log.tail(run.metrics_log, lambda lines: any(line["kind"] == "train" for line in lines))
    logged = max((line["step"] for line in lines if line["kind"] == "train"), default=0)
    saved = newest_step(run)
    if saved < logged and end < logged:
        raise ConfigError(
            f"{run.path} has logged step {logged:,} and resumes from step {saved:,}; it cannot end at step "
            f"{end:,} in between: use --run.max-steps {logged} or more, or another --run.name"
        )


def raise_if_stopped(config: Config, launch_env: LaunchEnv) -> None:
    """Raise StoppedError if this launch of torchrun, which now restarts the rank, has stopped the run on request.

    torchrun takes exit code 75 for a failure: the restarted rank must exit with it again, not train on.
    """
    run = choose_run(config, launch_env)
    outcome = read_outcome(run)
    if outcome and outcome["status"] == "stopped" and launch_env.restarts(outcome["launch_id"], mtime(run.outcome)):
        raise StoppedError(outcome["step"], outcome["reason"], run)


def choose_run(config: Config, launch_env: LaunchEnv) -> RunDir:
    """Return the directory to train in: the named one or, for a new run, the first free of NAME, NAME-2, ...

    torchrun restarts ranks by repeating their command. A run that this launch began is then resumed.
    """
    named = run_dir_of(config)
    if not starts_new_run(config):
        return named
    for run in _names(named):
        begin = None if (last := last_attempt(run)) is None else last.read_begin()
        if not run.path.exists() or (begin is not None and launch_env.restarts(begin["launch_id"], begin["time"])):
            break
    return run


def _names(named: RunDir) -> Iterator[RunDir]:
    """Yield NAME, NAME-2, NAME-3, ..."""
    yield named
    yield from (RunDir(named.path.with_name(f"{named.name}-{number}")) for number in count(2))


def start_attempt(
    config: Config, run: RunDir, asked: Callable[[], str] = lambda: "", launch_id: str | None = None, **begin: Any
) -> tuple[Config, Attempt]:
    """Claim an attempt of `run`, as choose_run chose it, and write its config.json; `begin` is added to begin.json.

    Return the config for this and later attempts: it names the run and resumes it. Raise ConfigError if the run has an
    owner or was finished meanwhile, CheckpointError if the checkpoint to start from is damaged, StopRequested as
    claim_attempt does.
    """
    rename_outdated(config)
    source = _read_source(config, run)
    config = _resumed(config, run)

    def committed_step() -> int:
        if check_run(config) is not None:  # the owner that claim_attempt waited for may have finished it
            raise ConfigError(f"{run.path} was finished by another start meanwhile; start again to see its table")
        return newest_step(run)

    settings, damage = config.model_dump(mode="json"), damage_note(run)
    begin |= {"launch_id": launch_id, "settings": settings}
    attempt = claim_attempt(run, asked, committed_step, config.run.mode, **begin)
    if damage:
        LOGGER.warning(f"{run.path}: {damage}")
    run.outcome.unlink(missing_ok=True)  # of the attempt before
    with heartbeat_thread(attempt):  # copying and syncing a large checkpoint can take longer than STALE_S
        remove_temp_dirs(run)
        _write_run(config, run, source)
    return config, attempt


def prepare_run(config: Config) -> Config:
    """Make the run's directory for a Slurm job; return its config. The caller has checked that the run has no owner."""
    rename_outdated(config)
    run = choose_run(config, LaunchEnv())
    source = _read_source(config, run)
    config = _resumed(config, run)
    make_run_dir(run.path, config.run.mode)
    run.stop.unlink(missing_ok=True)  # it was meant for an earlier start
    _write_run(config, run, source)
    return config


def _resumed(config: Config, run: RunDir) -> Config:
    """Return the config of all attempts of `run`: it names the run and resumes it."""
    shown = config.tracking.name or config.run.name  # in W&B: the run's name, and what the command line changed
    if shown.startswith(config.run.name):
        shown = f"{run.name}{shown.removeprefix(config.run.name)}"
    update = {
        "run": config.run.model_copy(update={"name": run.name}),
        "checkpoint": config.checkpoint.model_copy(update={"resume": "auto"}),
        "tracking": config.tracking.model_copy(update={"name": shown}),
    }
    return config.model_copy(update=update)


def _read_source(config: Config, run: RunDir) -> tuple[dict[str, Any], CheckpointBytes] | None:
    """Return `resumed_from` of manifest.json and the checkpoint that `run` starts from; None if there is none."""
    if run.config.exists() or (path := source_of(config)) is None:  # a run that exists goes on from its own
        return None
    try:
        source = read_checkpoint(path)
    except CorruptCheckpointError as error:
        raise CheckpointError(f"checkpoint.resume: {error}; use another one") from None
    return {"path": str(path.absolute()), "step": source.values["step"]}, source


def _write_run(config: Config, run: RunDir, source: tuple[dict[str, Any], CheckpointBytes] | None) -> None:
    """Write manifest.json, the checkpoint to start from if there is one, and config.json."""
    if source is not None:
        resumed_from, content = source
        open_manifest(run, resumed_from)
        # The evaluations of another run, and its best checkpoint, are not this one's.
        values = {**content.values, "run_id": read_manifest(run)["id"], **NO_EVALUATION}
        save_checkpoint(run, replace(content, values=values), 0, lambda: None)
    open_manifest(run, known_id=id_of_checkpoints(run))  # it may be lost
    open_run(config)  # last: a directory without config.json is no run yet, and a start that repeats this completes it


def _stretched(stored: Mapping[str, Any], config: Config) -> str:
    """Return the reason why another number of epochs is another training, where it is; else an empty string."""
    before, now = stored["run"]["epochs"], config.run.epochs
    if before == now or config.schedule.name == "constant":
        return ""
    return f": schedule.name {config.schedule.name} was stretched over {before} epochs, not {now}"
