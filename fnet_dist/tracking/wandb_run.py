"""The W&B run of a run directory: opened where W&B stands, followed from the ledger, closed.

Its id is the run's; every attempt goes on with it. Rows are written in the order of the ledger, each once, none left
out, so how many W&B has is all there is to know of where to go on. Its summary would not do: the SDK sends it before
the row, and a kill in between would lose that. It never gets `step=`, which drops what is behind; `trainer/step` is
the x axis.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import wandb

from fnet_dist.config.environment import ENVIRONMENT
from fnet_dist.config.load import read_config
from fnet_dist.processes import children, is_running
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.run_dir import RunDir, planned_length, read_json
from fnet_dist.tracking.offline_files import make_whole, offline_files, rows_written
from fnet_dist.tracking.rows import RowBuilder

INIT_S = 10.0
# Each of these would have a say of its own in what the run directory has settled.
_NOT_FOR_THE_SDK = (
    *ENVIRONMENT,
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_SERVICE"),
    "WANDB_DEBUG",  # it writes the key into the SDK's own log
)


@dataclass(frozen=True)
class Session:
    """An open W&B run, and how many rows it has."""

    wandb_run: wandb.Run
    rows_there: int


@dataclass(frozen=True)
class SyncResult:
    """What following came to: the `rows` that were read, and how many of them were `written`."""

    rows: RowBuilder
    written: int


def prepare_sdk() -> None:
    """Set this process up for the SDK: what the run directory settles, no variable may. Before the first other call."""
    for name in _NOT_FOR_THE_SDK:
        os.environ.pop(name, None)
    # A writer that is killed loses what is not on disk yet; the SDK's own interval is 15 s.
    os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "2")
    with suppress(ImportError):  # 0.3 s of a core that wandb.init would take beside the first steps
        import_module("wandb.sdk.launch")


def end_sdk() -> None:
    """Take the SDK down after it broke, its wandb-core with it: the next start counts what was written, and nothing may
    come after that count. It would also say that the run is in use."""
    with suppress(Exception):
        wandb.teardown()
    started = children(os.getpid())
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(map(is_running, started)):
        time.sleep(0.01)


def open_session(
    run: RunDir, folder: Path, mode: str, finish_s: float, watched_pid: int | None, stop: Callable[[], None]
) -> Session:
    """Begin the W&B run, or go on with it. The SDK keeps its files in `folder`/wandb; `watched_pid` is the process of
    which W&B shows how it uses the machine, if any.

    Raises whatever the SDK does, after INIT_S at the latest.
    """
    config = read_config(run.config)
    rows_offline = 0
    if mode == "offline":  # then the run is ours: nobody writes to the files of earlier attempts
        for path in offline_files(run):
            make_whole(path)
        rows_offline = rows_written(run)
    wandb_run = wandb.init(
        id=read_json(run.manifest)["id"],
        resume="allow",
        mode="offline" if mode == "offline" else "online",
        project=config.tracking.project,
        entity=config.tracking.entity,
        name=config.tracking.name,
        group=config.tracking.group,
        dir=str(folder),
        config=describe(run),
        allow_val_change=True,
        settings=wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            init_timeout=INIT_S,
            finish_timeout=finish_s,
            finish_timeout_raises=True,
            stop_fn=stop,
            program="fnet_dist/train.py",
            # On a login node that sends a run, they would be the wrong machine's.
            x_disable_meta=watched_pid is None,
            x_disable_machine_info=watched_pid is None,
            x_disable_stats=watched_pid is None,
            x_stats_pid=watched_pid or os.getpid(),
        ),
    )
    wandb_run.define_metric("trainer/step")
    wandb_run.define_metric("*", step_metric="trainer/step")
    wandb_run.define_metric("eval/accuracy", step_metric="trainer/step", summary="max")
    return Session(wandb_run, rows_offline if mode == "offline" else wandb_run.starting_step)


def describe(run: RunDir) -> dict[str, Any]:
    """The W&B run's config: every setting, what manifest.json says, and where each attempt ran."""
    manifest = read_json(run.manifest)
    last = last_attempt(run)
    begin = read_json(last.begin) if last is not None else {}
    return {
        **read_json(run.config),
        **{key: manifest.get(key) for key in ("versions", "git", "dataset", "device", "world_size", "resumed_from")},
        "slurm": {
            key.removeprefix("slurm_"): value
            for key, value in begin.items()
            if key.startswith("slurm_") and value is not None
        },
        "run_directory": str(run.path.absolute()),
    }


def follow(
    run: RunDir,
    session: Session,
    log_every_steps: int,
    is_over: Callable[[], bool],
    wait: Callable[[], object],
    still_ours: Callable[[], bool],
) -> SyncResult:
    """Write every row that `session` lacks, as the ledger gets its step, until the run `is_over`.

    `wait` passes the time between two looks. Before each row `still_ours` is asked; if not, nothing more is written.
    """
    rows, written = RowBuilder(log_every_steps), 0
    for number, row in enumerate(_complete_rows(run, rows, is_over, wait)):
        if number >= session.rows_there:
            if not still_ours():
                break
            session.wandb_run.log(row)
            written += 1
    return SyncResult(rows, written)


def _complete_rows(
    run: RunDir, rows: RowBuilder, is_over: Callable[[], bool], wait: Callable[[], object]
) -> Iterator[dict[str, float]]:
    reader = metrics_log.MetricsReader(run.metrics_log)
    over = False
    while not over:
        over = is_over()  # asked before reading: what was written before the end is read after it
        for line in reader.new():
            if (row := rows.add(line)) is not None:
                yield row
        if not over:
            wait()
    if not _is_evaluated(run, rows.waiting_step) and (row := rows.rest()) is not None:
        yield row


def _is_evaluated(run: RunDir, step: int | None) -> bool:
    """Whether `step` ends an epoch, or the run: its epoch line may be still to come, from the next attempt."""
    length = planned_length(run)
    return (
        step is not None and length is not None and (step % length.steps_per_epoch == 0 or step == length.total_steps)
    )


def close_session(run: RunDir, session: Session, followed: SyncResult, how: str, reason: str) -> None:
    """Best and last figures, the final weights where they are asked for, and the end: finished, stopped or failed, and
    the `reason` of outcome.json, "" if it is not known.

    Raises TimeoutError if the server has not taken everything in time.
    """
    wandb_run, rows = session.wandb_run, followed.rows
    wandb_run.summary.update({"outcome/status": how, "outcome/reason": reason})
    if rows.best is not None and rows.last_epoch is not None:
        wandb_run.summary.update(
            {
                "best/accuracy": rows.best["test_accuracy"],
                "best/epoch": rows.best["epoch"],
                "eval/accuracy": {"max": rows.best["test_accuracy"]},  # the SDK knows of its own attempt only
            }
        )
        if how == "finished":
            wandb_run.summary.update(
                {
                    "final/accuracy": rows.last_epoch["test_accuracy"],
                    "final/loss": rows.last_epoch["test_loss"],
                    "final/train_loss": rows.last_epoch["train_loss"],
                }
            )
    if how == "finished" and read_config(run.config).tracking.log_model and run.model.exists():
        last = rows.last_epoch or {}
        metadata = {key: last.get(key) for key in ("step", "epoch", "test_loss", "test_accuracy")}
        artifact = wandb.Artifact(f"{run.name}-model", type="model", metadata=metadata)
        artifact.add_file(str(run.model))
        wandb_run.log_artifact(artifact)
    if how == "stopped":
        wandb_run.mark_preempting()
    wandb_run.finish(exit_code={"finished": 0, "stopped": 75}.get(how, 1))
