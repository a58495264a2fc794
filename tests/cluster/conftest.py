"""A real Slurm for the tests of a file; without its programs they are skipped, and say what is missing."""

from collections.abc import Iterator

import pytest

from slurm.sandbox.cluster import local_cluster, missing_programs
from slurm.sandbox.conf_files import LocalCluster


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """Skips all tests here if one of Slurm's programs is missing."""
    if missing := missing_programs():
        pytest.skip(missing)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes, without accounting."""
    with local_cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def accounted() -> Iterator[LocalCluster]:
    """Three nodes, with accounting."""
    if missing := missing_programs(accounting=True):
        pytest.skip(missing)
    with local_cluster(3, accounting=True) as cluster:
        yield cluster
