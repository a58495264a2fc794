"""The run directory: every path in it is spelled here, and nowhere else.

runs/<name>/            created 0700: a closed door; what lies inside needs no modes of its own
  config.json           every setting, resolved                      open_run()
  manifest.json         versions, git commit, dataset and its hash   open_run()
  metrics.jsonl         the ledger                                   rank 0
  model.safetensors     the final weights                            rank 0
  predictions.safetensors   classes of every test image, thumbnails  rank 0
  outcome.json          how the run ended                            rank 0
  attempts/0001/        begin.json, end.json                         the attempt's owner
  report/               pictures and a page                          python -m jobs report
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from fnet_dist.config import Config
from fnet_dist.errors import ConfigError, StorageError

FORMAT = 1


class Outcome(TypedDict):
    """outcome.json. `status` is finished, stopped or failed; `reason` is one of the words in fnet_dist/README.md."""

    status: str
    reason: str
    step: int
    epoch: int
    test_accuracy: float | None
    exit_code: int
    launch_id: str | None


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
    def ledger(self) -> Path:
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
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def attempt(self, number: int) -> Path:
        """Directory of attempt `number`, counted from 1."""
        return self.attempts / f"{number:04d}"


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


def read_outcome(run: RunDir) -> Outcome | None:
    """How the run ended, or None while it has not."""
    outcome: Outcome | None = read_json(run.outcome)
    return outcome


def open_run(config: Config, manifest: Mapping[str, Any]) -> RunDir:
    """Write config.json and manifest.json; whoever calls has claimed an attempt, which made the directory."""
    run = run_of(config)
    write_json(run.config, config.model_dump(mode="json"))
    write_json(run.manifest, {"format": FORMAT, **manifest})
    return run


def run_of(config: Config) -> RunDir:
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
