"""Open the W&B run of a run directory, send it the rows that it lacks, and close it.

Exactly once: all attempts continue one W&B run, rows are sent in the order of the metrics log, and one process at a
time sends them (tracking_lock). So the number of rows that W&B has is the cursor: the next row to send has this number.
W&B's summary cannot be the cursor: the SDK sends it before the row, and a kill in between would lose the row. Nor can
`step=` of wandb.log(): W&B drops rows whose step is not above the last; the x axis is `trainer/step` instead.
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
from fnet_dist.config.load import read_section
from fnet_dist.processes import children, is_running
from fnet_dist.run.attempt import last_attempt
from fnet_dist.run.notices import NoticeReader
from fnet_dist.run.run_dir import RunDir, read_json, read_manifest
from fnet_dist.tracking.alerts import send_alerts
from fnet_dist.tracking.offline_files import make_whole, offline_files, rows_written
from fnet_dist.tracking.predictions import media_of
from fnet_dist.tracking.row_reader import RowReader, metric_directions
from fnet_dist.tracking.rows import Row
from fnet_dist.tracking.summary import gone_ranks, make_summary

INIT_S = 10.0  # for wandb.init(); the worker tries again later
# The SDK would let each of these overrule what the run directory has fixed.
_SDK_VARIABLES = (
    *ENVIRONMENT,
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_SERVICE"),
    "WANDB_DEBUG",  # it writes the API key into the SDK's own log
)


@dataclass(frozen=True)
class Session:
    """An open W&B run, and the number of rows that it had when it was opened: the cursor."""

    wandb_run: wandb.Run
    rows_there: int


def prepare_sdk() -> None:
    """Set up this process for the SDK, before the first other call of it."""
    for name in _SDK_VARIABLES:
        os.environ.pop(name, None)
    # A worker that is killed loses what is not on disk yet; the SDK flushes every 15 s by default.
    os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "2")
    # wandb.init() imports this private module: 0.3 s of CPU time that are better spent before the first steps.
    with suppress(ImportError):
        import_module("wandb.sdk.launch")


def end_sdk() -> None:
    """Stop the SDK after an error, and kill its wandb-core process.

    The next open_session counts the rows that were written: none may be written after that. And the server would say
    that the run is in use.
    """
    with suppress(Exception):
        wandb.teardown()
    started = children(os.getpid())
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(map(is_running, started)):
        time.sleep(0.01)


def open_session(
    run: RunDir,
    folder: Path,
    mode: str,
    finish_s: float,
    watched_pid: int | None,
    stop: Callable[[], None],
    *,
    ends_run: bool = True,
) -> Session:
    """Start the W&B run, or resume it; the SDK keeps its files in `folder`/wandb.

    W&B shows CPU, GPU and memory use of process `watched_pid` and its machine, if not None. `stop` is called when
    a user presses the dashboard's Stop button. Without `ends_run` the end of the session is not that of the run.
    Raises what the SDK raises, after INIT_S at the latest.
    """
    tracking, rows_offline = read_section(run.config, "tracking"), 0
    saved = read_json(run.tracking) or {}
    moved = {name: saved[name] for name in ("entity", "project") if saved.get(name)}
    if mode == "offline":  # only the run's owner is offline: no process writes to the files of earlier attempts
        for path in offline_files(run):
            make_whole(path)
        rows_offline = rows_written(run)
    # If `sync` sends a run from a login node, its host and commit are known, and nothing else must describe that node.
    off = watched_pid is None
    about: dict[str, Any] = {"disable_git": True, **_origin(run)} if off else {}
    # The SDK calls these private, and may rename them. Without machine info it does not send the host either.
    private: dict[str, Any] = {"x_disable_meta": off, "x_disable_machine_info": off and "host" not in about}
    private |= {"x_disable_stats": off, "x_stats_pid": watched_pid or os.getpid(), "x_update_finish_state": ends_run}
    wandb_run = wandb.init(
        id=saved.get("id") or read_manifest(run)["id"],
        resume="allow",
        mode="offline" if mode == "offline" else "online",
        **{**tracking.model_dump(include={"project", "entity", "name", "group"}), **moved},
        dir=str(folder),
        config=_run_config(run),
        allow_val_change=True,  # a resume may change operational settings
        settings=wandb.Settings(
            console="off",  # what ranks print stays in logs/
            silent=True,  # the worker prints its own lines
            save_code=False,
            init_timeout=INIT_S,
            finish_timeout=finish_s,
            finish_timeout_raises=True,  # else lost rows would go unnoticed
            stop_fn=stop,
            program="fnet_dist/train.py",
            **about,
            **{name: value for name, value in private.items() if name in wandb.Settings.model_fields},
        ),
    )
    wandb_run.define_metric("trainer/step")
    wandb_run.define_metric("*", step_metric="trainer/step")
    for name, direction in metric_directions(run).items():
        summary = "max" if direction == "higher" else "min"
        wandb_run.define_metric(f"eval/{name}", step_metric="trainer/step", summary=summary)
    return Session(wandb_run, rows_offline if mode == "offline" else wandb_run.starting_step)


def _origin(run: RunDir) -> dict[str, Any]:
    """Return where and from which code `run` was trained, for a session on another machine."""
    last, commit = last_attempt(run), (read_manifest(run).get("git") or {}).get("commit")
    host = None if last is None else last.read_begin()["host"]
    return {name: value for name, value in {"host": host, "git_commit": commit}.items() if value}


def _run_config(run: RunDir) -> dict[str, Any]:
    """Return the W&B run's config: every setting, the manifest, and the last attempt's Slurm job."""
    manifest = read_manifest(run)
    last = last_attempt(run)
    begin = last.read_begin() if last is not None else {}
    return {
        **(read_json(run.config) or {}),
        **{key: manifest.get(key) for key in ("versions", "git", "dataset", "device", "world_size", "resumed_from")},
        "slurm": {
            key.removeprefix("slurm_"): value
            for key, value in begin.items()
            if key.startswith("slurm_") and value is not None
        },
        "run_directory": str(run.path.absolute()),
    }


def follow(
    run: RunDir, session: Session, log_every_steps: int, wait_for_end: Callable[[], bool], is_owner: Callable[[], bool]
) -> tuple[RowReader, int]:
    """Send every row that `session` lacks, as the metrics log grows; with `tracking.alerts`, new notices too.

    `wait_for_end` waits a moment and returns True once nothing more will be recorded. `is_owner` is asked before each
    row; once it returns False nothing more is sent. Returns the reader of the metrics log, and the rows sent.
    """
    reader, written = RowReader(run, log_every_steps, session.rows_there), 0
    # Offline none: `sync` sends them. In the SDK's offline files, nobody could tell which ones were sent.
    alerts = read_section(run.config, "tracking").alerts != "off" and not session.wandb_run.offline
    notices = NoticeReader(run, run.alerts_given) if alerts else None

    def all_rows() -> Iterator[Row]:
        is_over = False
        while not is_over:
            is_over = wait_for_end()  # before reading: lines that were written before the end are then read
            yield from reader.new()
            if notices is not None and notices.has_new() and is_owner():
                send_alerts(session.wandb_run, notices)
        yield from reader.last()

    for row in all_rows():
        if reader.number > session.rows_there:
            if not is_owner():
                break
            session.wandb_run.log(row | media_of(run, row))
            written += 1
    return reader, written


def close_session(session: Session, rows: RowReader, status: str, reason: str) -> None:
    """Send summary figures, the final weights if `tracking.log_model` asks for them, and the end.

    `status` (finished, stopped or failed) and `reason` are those of outcome.json; `reason` is "" if not known. Raises
    TimeoutError if the server has not taken everything in time.
    """
    run, wandb_run, last = rows.run, session.wandb_run, rows.builder.state.last_evaluation
    summary: Any = wandb_run.summary
    summary.update(make_summary(rows, status, reason))
    if (window := rows.builder.state.window) is not None:
        for key in gone_ranks([*summary.keys()], window["world_size"]):
            del summary[key]
    if status == "finished" and read_section(run.config, "tracking").log_model and run.model.exists():
        metadata = {} if last is None else {key: last[key] for key in ("step", "epoch", "loss", "metrics")}
        artifact = wandb.Artifact(f"{run.name}-model", type="model", metadata=metadata)
        artifact.add_file(str(run.model))
        wandb_run.log_artifact(artifact)
    if status == "stopped":
        wandb_run.mark_preempting()
    wandb_run.finish(exit_code={"finished": 0, "stopped": 75}.get(status, 1))  # as the launcher's own exit codes
    rows.save()
