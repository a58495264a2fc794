"""A job file of a test, and what becomes of it."""

from pathlib import Path
from typing import Any

import pytest

from fnet_dist.config.load import load_config
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError

JOB = "[run]\nepochs = 3\n[optim]\nlr = 3e-3\n"


def load(job: Path, *overrides: str, env: dict[str, str] | None = None) -> Config:
    """The settings, in an environment that says nothing but `env`."""
    return load_config(["--config", str(job), *overrides], env or {})


def error(job: Path, *overrides: str) -> str:
    """What is said of it."""
    with pytest.raises(ConfigError) as caught:
        load(job, *overrides)
    return str(caught.value)


def write(path: Path, text: Any) -> Path:
    """`path`, holding `text`."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
