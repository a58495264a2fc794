"""Fixtures that every test may use."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# Only tests of tracking track, and they say where to: no other run starts the SDK, or is shown to anybody.
os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds the real Fashion-MNIST, as FNET_DATA names it."""
    root = os.environ.get("FNET_DATA")
    if root is None or not (Path(root) / "FashionMNIST" / "raw").is_dir():
        pytest.skip("FNET_DATA does not name a folder that holds FashionMNIST/raw")
    return Path(root).resolve()


@pytest.fixture(scope="module")
def unmeasured() -> Iterator[None]:
    """What these tests start is not traced for coverage, which slows it: other tests run the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """A test that leaves a changed environment or a running thread of its own behind fails."""
    before = dict(os.environ)
    threads = set(threading.enumerate())
    yield
    after = dict(os.environ)
    for environment in (before, after):
        for name in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"):  # torch sets the latter at the first optimizer
            environment.pop(name, None)
    assert after == before
    left = [thread.name for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert left == []


@pytest.fixture(scope="module")
def gone_pid() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid
