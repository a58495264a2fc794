"""The run directory: all paths in it, and how its small files are written and read.

runs/<name>/                who writes it
  config.json               open_run(): every setting, resolved
  manifest.json             open_run(), then rank 0: run id, versions, git commit, dataset
  metrics.jsonl             rank 0: the metrics log, one JSON object a line (metrics_log.py)
  checkpoints/              rank 0: step_00000938/ and so on (fnet_dist/checkpoint/storage.py)
  model.safetensors         rank 0, at the end: the final weights
  predictions.safetensors   rank 0, at the end: predicted class of every test image, and thumbnails
  outcome.json              rank 0, or the attempt's owner if rank 0 cannot: how the run ended (outcome.py)
  attempts/0001/            begin.json, end.json, alive: the attempt's owner, `jobs run` or else rank 0 (attempt.py)
                            rank_0.log, rank_0.error: that rank; wandb.log: the tracking process
  report/                   `jobs report`: pictures and an HTML page
  wandb/                    the tracking process, `jobs sync`: tracking.json, a lock, the files of the W&B SDK
  job.json job.sbatch       `jobs submit`: the Slurm job and its script
  code/3fa2b1c09d7e/        `jobs submit`: the copy of the code that the job runs
  submitit/                 submitit: pickles, and the output of each node's launcher
  STOP                      `jobs stop`, or anybody: asks the run to save and stop (stop.py)
"""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError, StorageError

FORMAT = 1
SWEEPS = "sweeps"  # beside the runs: a directory for each sweep, with its code, its script and its nodes' output
SNAPSHOT = "snapshot.json"  # in the root of code that was copied for a job: its git commit


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

    config = PathInside("config.json")
    manifest = PathInside("manifest.json")
    metrics_log = PathInside("metrics.jsonl")
    checkpoints = PathInside("checkpoints")
    model = PathInside("model.safetensors")
    predictions = PathInside("predictions.safetensors")
    outcome = PathInside("outcome.json")
    attempts = PathInside("attempts")
    report = PathInside("report")
    wandb = PathInside("wandb")
    tracking = PathInside("wandb/tracking.json")
    tracking_lock = PathInside("wandb/online.lock")
    job = PathInside("job.json")
    sbatch = PathInside("job.sbatch")
    code = PathInside("code")
    submitit = PathInside("submitit")
    stop = PathInside("STOP")

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
    # A read-only descriptor does for both; a directory cannot be opened for writing.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old bytes or the new ones, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Without it, the new name may reach the disk before the bytes: a power cut then leaves an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically. Raise ValueError for NaN and infinity: JSON has neither."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the JSON in `path`, None if there is no such file. Raise StorageError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}; restore it, or remove the run's directory") from None


def mtime(path: Path) -> float:
    """Return when `path` was last written, as Unix time in seconds; 0 if it does not exist."""
    # An NFS client answers stat() from a cache that may be a minute old, but asks the server at each open.
    with suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


@dataclass(frozen=True)
class RunLength:
    """The length of a run, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int


def planned_length(run: RunDir, settings: Mapping[str, Any] | None = None) -> RunLength | None:
    """Return the length of `run` by `settings` (None: its config.json); None until its data is known."""
    config, manifest = settings or read_json(run.config), read_json(run.manifest) or {}
    if config is None or "dataset" not in manifest:
        return None
    steps_per_epoch = -(-manifest["dataset"]["train_count"] // config["data"]["global_batch_size"])
    total_steps = config["run"]["epochs"] * steps_per_epoch
    return RunLength(steps_per_epoch, min(total_steps, config["run"]["max_steps"] or total_steps))


def open_run(config: Config) -> RunDir:
    """Write config.json, and manifest.json if there is none. The caller has claimed an attempt or owns a new run."""
    run = run_dir_of(config)
    open_manifest(run)
    settings = config.model_dump(mode="json")
    # A restart may read config.json from any directory, and resumes: `required`, `new` and PATH apply to one start.
    settings["run"]["root"] = str(run.path.absolute().parent)
    settings["checkpoint"]["resume"] = "auto"
    write_json(run.config, settings)
    return run


def open_manifest(run: RunDir, resumed_from: Mapping[str, Any] | None = None) -> None:
    """Give `run` an id if it has none; `resumed_from` is the checkpoint of another run that it starts from."""
    if read_json(run.manifest) is None:
        write_json(run.manifest, {"format": FORMAT, "id": secrets.token_hex(8), "resumed_from": resumed_from})


def write_manifest(run: RunDir, found: Mapping[str, Any]) -> None:
    """Update manifest.json with what this attempt `found`; the run's id and origin never change."""
    before = read_json(run.manifest)
    write_json(run.manifest, {**before, **found, **{key: before[key] for key in ("format", "id", "resumed_from")}})


def node_logs(run: RunDir, job_id: str) -> list[Path]:
    """Return submitit's logs of each node in a job of `run`, JOB_NODE_log.out; those of an array lie in its sweep."""
    folders = [run.submitit, *run.path.parent.glob(f"{SWEEPS}/*/{run.submitit.name}")]
    return [path for folder in folders for path in folder.glob(f"{job_id}_*_log.out")]


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
    runs = sorted(
        (path.parent for path in root.glob("*/config.json")), key=lambda path: path.stat().st_mtime, reverse=True
    )
    if text is None and runs:
        return RunDir(runs[0].resolve())
    there = ", ".join(path.name for path in runs[:5]) or "none"
    raise ConfigError(
        f"no run {text!r}: neither a name under {root.absolute()} nor a run directory; newest there: {there}"
        if text is not None
        else f"no run in {root.absolute()}; start one: python -m fnet_dist.train --config jobs/quickstart.toml"
    )
