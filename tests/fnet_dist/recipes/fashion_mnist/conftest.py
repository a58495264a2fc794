"""Data directories of the tests of Fashion-MNIST."""

import pytest

from fnet_dist.recipes.fashion_mnist.files import FOLDERS, OFFICIAL


@pytest.fixture
def root(tmp_path, real_data):
    """A data directory whose files are links to the real ones."""
    raw = tmp_path / FOLDERS[0]
    raw.mkdir(parents=True)
    for name in OFFICIAL:
        (raw / name).symlink_to(real_data / FOLDERS[0] / name)
    return tmp_path
