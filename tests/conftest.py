"""Fixtures that every test may use."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fnet_dist.run import attempt
from fnet_dist.run.log import configure_logging
from slurm.sandbox.cluster import local_cluster, missing_programs
from slurm.sandbox.conf_files import LocalCluster
from tests.helpers import checkpoint_faults
from tests.helpers.job_files import JOB, write
from tests.helpers.wandb_server import WandbServer

REPOSITORY = Path(__file__).parents[1]

# Only tests of tracking track, and they say where to: no other run starts the SDK, or is shown to anybody.
os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("WANDB_API_KEY", None)

os.environ["FNET_LOGIN"] = ""  # commands run here, whatever slurm/site.toml says
os.environ.pop("FNET_LOG", None)
configure_logging("tests")

# Coverage of the processes that tests start is measured only where a test asks for it with the fixture `measured`. A
# process that is killed while it saves its data leaves a damaged file, and the total would depend on luck. xdist's
# workers have started measuring before they import this file.
MEASURE = os.environ.pop("COVERAGE_PROCESS_CONFIG", None) if "PYTEST_XDIST_WORKER" in os.environ else None


# In this order: the longest first, so that no worker starts one alone at the end, and many ranks beside waiting.
FIRST = (
    *("promises/test_same_bits_at_any_number_of_ranks", "jobs/launcher/test_on_slurm", "jobs/launcher/test_pack"),
    *("fnet_dist/tracking/test_worker_faults", "jobs/commands/test_status_on_slurm"),
    *("promises/test_same_training_at_any_world_size", "jobs/commands/test_rehearse", "recipes/test_recipes"),
    *("slurm/test_client_on_slurm", "fnet_dist/training/test_features", "fnet_dist/tracking/test_worker"),
    *("jobs/doctor/test_allreduce_check", "jobs/launcher/test_restarts", "jobs/commands/test_drill"),
    *("jobs/launcher/test_notices", "jobs/commands/test_submit"),
    *("fnet_dist/run/test_stop_processes", "jobs/doctor/test_node_job"),
    *("slurm/sandbox/test_cluster", "promises/test_stopping_costs_nothing", "fnet_dist/training/test_failures"),
    *("fnet_dist/test_train", "promises/test_the_book", "jobs/verification/test_replay", "jobs/commands/test_report"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in FIRST before the others."""
    order = {f"tests/{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


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
def measured() -> Iterator[None]:
    """Measure the coverage of the processes that these tests start. They must end by themselves: none may be killed."""
    with pytest.MonkeyPatch.context() as patch:
        if MEASURE is not None:
            patch.setenv("COVERAGE_PROCESS_CONFIG", MEASURE)
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
    """Let a living owner write its heartbeat fifty times a second; the time after which one counts as dead stays."""
    monkeypatch.setattr(attempt, "HEARTBEAT_EVERY_S", 0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take an owner for dead after 0.3 s. For tests without a living owner only: a slow one would count as dead."""
    monkeypatch.setattr(attempt, "STALE_S", 0.3)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A local W&B server."""
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Skip the test if one of Slurm's programs is missing."""
    if missing := missing_programs():
        pytest.skip(missing)


@pytest.fixture(scope="module")
def cluster(slurm_programs: None) -> Iterator[LocalCluster]:
    """A real Slurm of three nodes, without accounting."""
    with local_cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def accounted() -> Iterator[LocalCluster]:
    """A real Slurm of three nodes, with accounting."""
    if missing := missing_programs(accounting=True):
        pytest.skip(missing)
    with local_cluster(3, accounting=True) as cluster:
        yield cluster
