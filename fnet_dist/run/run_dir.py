"""The run directory: all paths in it (README.md: who writes each), and how its small files are written and read."""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fnet_dist.config.batch_split import batches
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError, StorageError
from fnet_dist.processes import absolute

FORMAT = 2  # of manifest.json and the metrics log; format 1 is still read (metrics_log.py)
SWEEPS = "sweeps"  # beside the runs: a directory for each sweep, with its code, its script and its nodes' output


class PathInside:
    """A path inside the `path` of the object, as an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, directory: Any, owner: type) -> Path:
        return Path(directory.path, self._name)


@dataclass(frozen=True)
class RunDir:
    """The paths of one run. Building it does not touch the disk."""

    path: Path

    config = PathInside("config.json")  # every setting, resolved
    manifest = PathInside("manifest.json")  # run id, versions, git commit, dataset: what the bits depend on
    metrics_log = PathInside("metrics.jsonl")  # one JSON object a line (metrics_log.py)
    log_position = PathInside("metrics.position.json")  # where a start goes on reading it (log_position.py)
    notices = PathInside("notices.jsonl")  # events that a person is told of, if any outlet is on (notices.py)
    notices_given = PathInside("notices.given.json")  # how many of them the site's command got
    checkpoints = PathInside("checkpoints")  # step_00000938/ and so on (fnet_dist/checkpoint/storage.py)
    model = PathInside("model.safetensors")  # the final weights
    best = PathInside("best.json")  # step and value of the best evaluation whose checkpoint is kept
    best_model = PathInside("model.best.safetensors")  # its weights, once the run has finished
    predictions = PathInside("predictions.safetensors")  # predicted class of every test image, and thumbnails
    best_predictions = PathInside("predictions.best.safetensors")  # of the best evaluation; with log_predictions
    outcome = PathInside("outcome.json")  # how the run ended (outcome.py)
    attempts = PathInside("attempts")  # 0001/ and so on: who owned the run, and how each attempt ended (attempt.py)
    logs = PathInside("logs")  # 0001/ and so on, what each attempt printed: nothing depends on it
    report = PathInside("report")  # `fnet report`: pictures and an HTML page
    wandb = PathInside("wandb")  # the files of the W&B SDK
    tracking = PathInside("wandb/tracking.json")
    tracking_position = PathInside("wandb/position.json")  # where the next attempt's rows begin (row_reader.py)
    alerts_given = PathInside("wandb/alerts.json")  # how many notices W&B got (fnet_dist/tracking/alerts.py)
    tracking_lock = PathInside("wandb/online.lock")  # one process at a time sends rows
    job = PathInside("job.json")  # `fnet submit`: the Slurm job
    sbatch = PathInside("job.sbatch")  # `fnet submit`: its script
    code = PathInside("code")  # `fnet submit`: the copy of the code that the job runs
    submitit = PathInside("submitit")  # pickles, and the output of each node's launcher
    sweep = PathInside("sweep.json")  # `fnet sweep`, in the sweep's directory: its command, seed and runs
    stop = PathInside("STOP")  # asks the run to save and stop (stop.py)
    ask = PathInside("ASK")  # asks it for something while it trains (ask.py)

    @property
    def name(self) -> str:
        """The run's name: that of its directory."""
        return self.path.name

    def attempt(self, number: int) -> Path:
        """Return the directory of attempt `number`, counted from 1."""
        return self.attempts / f"{number:04d}"

    def checkpoint(self, step: int) -> Path:
        """Return the directory of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step_{step:08d}"


def fsync(path: Path) -> None:
    """Wait until the content of the file or directory `path` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)  # does for both; a directory cannot be opened for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace `path` by `content`: a reader sees the old bytes or the new ones, also after a crash.

    Without `sync`, for a file whose readers check it, a power cut may leave an empty one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # in the same directory: rename(2) crosses no file system
    try:
        temporary.write_bytes(content)
        if sync:  # else the new name may reach the disk before the bytes
            fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically. Raise ValueError for NaN and infinity: JSON has neither."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the JSON object in `path`; None if there is no such file, or one that is empty or damaged.

    No small file may stand between a user and good checkpoints: whoever writes it next replaces it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) and value else None


def read_manifest(run: RunDir) -> dict[str, Any]:
    """Return manifest.json. Raise StorageError if it is missing or damaged."""
    manifest: dict[str, Any] | None = read_json(run.manifest)
    if manifest is None:
        raise StorageError(f"{run.manifest} is missing or damaged; start the run again, which writes it anew")
    return manifest


def mtime(path: Path) -> float:
    """Return when `path` was last written, as Unix time in seconds; 0 if it does not exist."""
    # Not stat(): an NFS client answers it from a cache that may be a minute old, but asks the server at each open.
    with suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


class RunLength(NamedTuple):
    """The length of a run, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int


def planned_length(run: RunDir, settings: Mapping[str, Any] | None = None) -> RunLength | None:
    """Return the length of `run` by `settings` (None: its config.json); None until its data is known."""
    config, manifest = settings or read_json(run.config), read_json(run.manifest) or {}
    if config is None or "dataset" not in manifest:
        return None
    steps_per_epoch = batches(
        manifest["dataset"]["train_count"], config["data"]["global_batch_size"], config["data"].get("drop_last", False)
    )
    total_steps = config["run"]["epochs"] * steps_per_epoch
    return RunLength(steps_per_epoch, min(total_steps, config["run"]["max_steps"] or total_steps))


def open_run(config: Config) -> RunDir:
    """Write config.json, and manifest.json if there is none. The caller has claimed an attempt or owns a new run."""
    run = run_dir_of(config)
    open_manifest(run)
    write_config(run, config.model_dump(mode="json"))
    return run


def write_config(run: RunDir, settings: Mapping[str, Any]) -> None:
    """Write `settings`, those of an attempt of `run`, to config.json."""
    # A restart may read the file from any directory. `required`, `new` and PATH apply to one start.
    place = {"name": run.name, "root": str(absolute(run.path).parent)}
    resume = settings["checkpoint"] | {"resume": "auto"}
    write_json(run.config, {**settings, "run": settings["run"] | place, "checkpoint": resume})


def open_manifest(run: RunDir, resumed_from: Mapping[str, Any] | None = None, known_id: str | None = None) -> None:
    """Give `run` an id if it has none: `known_id`, which its checkpoints have if it lost its manifest, else a new one.

    `resumed_from` is the checkpoint of another run that it starts from.
    """
    if read_json(run.manifest) is None:
        identity = known_id or secrets.token_hex(8)
        write_json(run.manifest, {"format": FORMAT, "id": identity, "resumed_from": resumed_from})


def write_manifest(run: RunDir, found: Mapping[str, Any]) -> None:
    """Update manifest.json with what this attempt `found`; the run's id and origin never change."""
    before = read_json(run.manifest)
    write_json(run.manifest, {**before, **found, **{key: before[key] for key in ("format", "id", "resumed_from")}})


def node_logs(run: RunDir, job_id: str) -> list[Path]:
    """Return submitit's logs of each node in a job of `run`, JOB_NODE_log.out; those of an array lie in its sweep.

    Of a run that shares its task with others, it is the run's own log, once there is one.
    """
    pattern = node_log(run, job_id, "*").name
    own = [*run.submitit.glob(pattern)]
    return own or [*run.path.parent.glob(f"{SWEEPS}/*/{run.submitit.name}/{pattern}")]


def node_log(run: RunDir, job_id: str, node: int | str) -> Path:
    """Return the file that takes what the launcher on a node of `job_id` prints, as submitit names it."""
    return run.submitit / f"{job_id}_{node}_log.out"


def run_dir_of(config: Config) -> RunDir:
    """Return the directory that `config` names."""
    return RunDir(Path(config.run.root).expanduser() / config.run.name)


def find_run(text: str | None, root: Path = Path("runs")) -> RunDir:
    """Return the run with the name `text` under `root` or in the directory `text`; the newest if `text` is None.

    Raise ConfigError, which names the runs that are there, if there is no such run.
    """
    if text is not None:
        for path in (root / text, Path(text)):
            if RunDir(path).config.is_file():
                return RunDir(path.resolve())
    runs = [path.parent for path in root.glob("*/config.json")]
    runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if text is not None:
        there = ", ".join(path.name for path in runs[:5]) or "none"
        raise ConfigError(
            f"no run {text!r}: neither a name under {root.absolute()} nor a run directory; newest there: {there}"
        )
    if not runs:
        raise ConfigError(f"no run in {root.absolute()}; start one: fnet run jobs/quickstart.toml")
    return RunDir(runs[0].resolve())
