"""What a run was made of: versions, code and data, for manifest.json."""

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fnet_dist.config.load import result_settings
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.process_group import Group
from fnet_dist.run.git import git_state


def build_manifest(
    config: Config, group: Group, train_data: Dataset, test_data: Dataset, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What manifest.json says besides the run's id and origin; `before` is what it said at the attempt before this."""
    conditions = _conditions(config, group)
    was = (before or {}).get("conditions", conditions)
    return {
        # What the bits depend on, besides the settings: where one changes, so may they.
        "conditions": conditions,
        "conditions_changed": [
            f"{key} {new}, before {was.get(key)}" for key, new in conditions.items() if was.get(key) != new
        ],
        "receipt": {
            "code": _code_sha256(),
            "data": _sha256(train_data.info.sha256, test_data.info.sha256),
            "config": _sha256(*(f"{name}={value}" for name, value in sorted(result_settings(config).items()))),
            "environment": _sha256(platform.python_version(), *_installed()),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "torchvision": version("torchvision"),
            "fnet_dist": version("fnet-dist"),
        },
        "git": git_state(Path(__file__).parents[2]),
        "dataset": {
            "name": train_data.info.name,
            "stand_in": train_data.info.is_synthetic,
            "sha256": train_data.info.sha256,
            "test_sha256": test_data.info.sha256,
            "train_count": len(train_data),
            "test_count": len(test_data),
            "class_names": list(train_data.info.class_names),
        },
        "device": group.device.type,
        "world_size": group.world_size,
        # Denormal numbers are set to zero, in every run and on every rank: it changes bits, so it is said.
        "flush_denormal": True,
    }


def _code_sha256() -> str:
    """Of the trainer's own files."""
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob("*.py"))
    return _sha256(*(f"{path.relative_to(folder).as_posix()}\0{path.read_text()}" for path in files))


def _conditions(config: Config, group: Group) -> dict[str, Any]:
    on_gpu = group.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(group.device) if on_gpu else "cpu",
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".strip(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compile": config.parallel.compile,
    }


def _installed() -> list[str]:
    """NAME-VERSION.dist-info of every package; to read what is in them would take a tenth of a second of each start."""
    return sorted({path.name for folder in sys.path for path in Path(folder).glob("*.dist-info")})


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
