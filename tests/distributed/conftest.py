"""Fixtures of the tests that start processes."""

from collections.abc import Iterator

import pytest

from tests.wandb_server import WandbServer


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
