"""Write a job file for a test, and load it."""

from pathlib import Path
from typing import Any

import pytest

from fnet_dist.config.load import load_config
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError

JOB = "[run]\nepochs = 3\n[optim]\nlr = 3e-3\n"


def load(job: Path, *overrides: str, env: dict[str, str] | None = None) -> Config:
    """Return the settings of `job` in the environment `env`, by default an empty one."""
    return load_config(["--config", str(job), *overrides], env or {})


def error(job: Path, *overrides: str) -> str:
    """Return the error message of a job file that is refused."""
    with pytest.raises(ConfigError) as caught:
        load(job, *overrides)
    return str(caught.value)


def write(path: Path, text: Any) -> Path:
    """Write `text` to `path` and return `path`."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
