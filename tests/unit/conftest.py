"""Fixtures of the tests that start no training."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from fnet_dist.run import attempt
from tests.unit import checkpoint_faults
from tests.unit.job_files import JOB, write


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file."""
    return write(tmp_path / "job.toml", JOB)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A run with checkpoints of steps 10, 20 and 30, and their contents."""
    return checkpoint_faults.make_run(tmp_path / "r", Random(20261124), (10, 20, 30))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A living owner shows itself fifty times a second; the patience with one that does not stays as it is."""
    monkeypatch.setattr(attempt, "ALIVE_EVERY_S", 0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for tests in which nobody shows a sign of life: on a slow machine a living owner would count as dead."""
    monkeypatch.setattr(attempt, "STALE_S", 0.3)
