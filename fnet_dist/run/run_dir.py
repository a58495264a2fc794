"""The run directory: every path in it is spelled here, and nowhere else.

runs/<name>/            created 0700: a closed door; what lies inside needs no modes of its own
  config.json           every setting, resolved                      open_run()
  manifest.json         the run's id, versions, git commit, dataset  open_run(), then rank 0
  metrics.jsonl         the ledger                                   rank 0
  checkpoints/          step_00000938/, see checkpoint_dir.py        rank 0
  model.safetensors     the final weights                            rank 0
  predictions.safetensors   classes of every test image, thumbnails  rank 0
  outcome.json          how the run ended                            rank 0, or the attempt's owner where no rank can
  attempts/0001/        begin.json, end.json, alive                  the attempt's owner
                        rank_0.log, rank_0.error                     that rank
  report/               pictures and a page                          python -m jobs report
  wandb/                tracking.json, a lock, what the SDK keeps    rank 0's tracking process, python -m jobs sync
  job.json job.sbatch   the Slurm job, the text that was submitted   python -m jobs submit
  code/3fa2b1c09d7e/    the code that such a job runs                python -m jobs submit
  submitit/             pickles, and what each node printed          submitit
  STOP                  asks for a checkpoint and an end             python -m jobs stop, or anybody
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
SWEEPS = "sweeps"  # beside the runs: one directory a sweep, for its code, script and what its nodes print
SNAPSHOT = "snapshot.json"  # in the root of code that was copied for a job: which commit it was


@dataclass(frozen=True)
class RunDir:
    """The paths of one run; building it touches no disk."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_log(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.safetensors"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def sbatch(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def tracking(self) -> Path:
        return self.wandb / "tracking.json"

    @property
    def tracking_lock(self) -> Path:
        return self.wandb / "online.lock"

    def attempt(self, number: int) -> Path:
        """Directory of attempt `number`, counted from 1."""
        return self.attempts / f"{number:04d}"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step_{step:08d}"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old bytes or the new ones, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}; restore it, or remove the run's directory") from None


def mtime(path: Path) -> float:
    """When `path` was last written, in Unix time; 0 where it is not. Opened: only that asks a shared disk anew."""
    with suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


@dataclass(frozen=True)
class RunLength:
    """How long a run is to be, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int


def planned_length(run: RunDir, settings: Mapping[str, Any] | None = None) -> RunLength | None:
    """How long the run is to be by `settings`, its own if None; None before its data was found."""
    config, manifest = settings or read_json(run.config), read_json(run.manifest) or {}
    if config is None or "dataset" not in manifest:
        return None
    steps_per_epoch = -(-manifest["dataset"]["train_count"] // config["data"]["global_batch_size"])
    total_steps = config["run"]["epochs"] * steps_per_epoch
    return RunLength(steps_per_epoch, min(total_steps, config["run"]["max_steps"] or total_steps))


def open_run(config: Config) -> RunDir:
    """Write config.json, and manifest.json where there is none yet.

    Whoever calls has claimed an attempt, which made the directory. Restarts read config.json: its root is absolute,
    and it just goes on (resume "auto").
    """
    run = run_dir_of(config)
    open_manifest(run)
    settings = config.model_dump(mode="json")
    settings["run"]["root"] = str(run.path.absolute().parent)
    settings["checkpoint"]["resume"] = "auto"
    write_json(run.config, settings)
    return run


def open_manifest(run: RunDir, resumed_from: Mapping[str, Any] | None = None) -> None:
    """Give the run its id, if it has none yet; `resumed_from` is the checkpoint of another run that it starts from."""
    if read_json(run.manifest) is None:
        write_json(run.manifest, {"format": FORMAT, "id": secrets.token_hex(8), "resumed_from": resumed_from})


def write_manifest(run: RunDir, found: Mapping[str, Any]) -> None:
    """Complete manifest.json by what this attempt found; id and origin stay as they are."""
    before = read_json(run.manifest)
    write_json(run.manifest, {**before, **found, **{key: before[key] for key in ("format", "id", "resumed_from")}})


def node_logs(run: RunDir, job_id: str) -> list[Path]:
    """What submitit keeps of each node's output in a job of `run`, JOB_NODE_log.out; of an array, beside its sweep."""
    folders = [run.submitit, *run.path.parent.glob(f"{SWEEPS}/*/{run.submitit.name}")]
    return [path for folder in folders for path in folder.glob(f"{job_id}_*_log.out")]


def run_dir_of(config: Config) -> RunDir:
    """The directory that `config` names."""
    return RunDir(Path(config.run.root).expanduser() / config.run.name)


def find_run(text: str | None, root: Path = Path("runs")) -> RunDir:
    """The run that a person means: its name under `root`, its directory, or the newest where `text` is None.

    Raises ConfigError, naming the runs that are there, if nothing fits.
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
