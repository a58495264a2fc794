"""What a run was made of: versions, code and data, for manifest.json."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fnet_dist.batching import Dataset
from fnet_dist.commit import git_state
from fnet_dist.group import Group


def build_manifest(group: Group, train_data: Dataset, test_data: Dataset) -> dict[str, Any]:
    """What manifest.json says besides the run's id and origin."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "torchvision": version("torchvision"),
            "fnet_dist": version("fnet-dist"),
        },
        "git": git_state(Path(__file__).parents[1]),
        "dataset": {
            "name": train_data.name,
            "stand_in": train_data.stand_in,
            "sha256": train_data.sha256,
            "test_sha256": test_data.sha256,
            "train_count": len(train_data),
            "test_count": len(test_data),
            "class_names": list(train_data.class_names),
        },
        "device": group.device.type,
        "world_size": group.world_size,
        # Denormal numbers are set to zero, in every run and on every rank: it changes bits, so it is said.
        "flush_denormal": True,
    }
