"""Reproducibility of a run: the manifest of everything it depends on, and warnings about what makes it inexact."""

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fnet_dist.config.load import result_settings
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.process_group import Group
from fnet_dist.run.git import git_state

# ---- The manifest: everything that the bits of a run depend on -------------------------------------------------------


def build_manifest(
    config: Config, group: Group, train_data: Dataset, test_data: Dataset, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the contents of manifest.json besides the run's id and origin; `before` are those of the last attempt."""
    conditions = _conditions(config, group)
    last = (before or {}).get("conditions", conditions)
    return {
        # Besides the settings, the bits depend on these: a resume that changes one prints a warning.
        "conditions": conditions,
        "conditions_changed": [
            f"{key} {new}, before {last.get(key)}" for key, new in conditions.items() if last.get(key) != new
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
        # Set in every run, on every rank (configure_arithmetic), and recorded because it changes bits.
        "flush_denormal": True,
    }


def _code_sha256() -> str:
    """Return the hash of all files of the fnet_dist package."""
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
    """Return NAME-VERSION.dist-info of every installed package. importlib.metadata would read each one: 0.1 s."""
    return sorted({path.name for folder in sys.path for path in Path(folder).glob("*.dist-info")})


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---- Warnings: what makes training differ between numbers of ranks ---------------------------------------------------

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def reproducibility_warnings(model: nn.Module, config: Config) -> list[str]:
    """Return a warning for each part of the model and settings that makes training inexact; [] for an exact run."""
    parallel = config.parallel
    if parallel.numerics == "invariant":
        return []
    modules = list(model.modules())
    # The functional form of the model calls F.dropout and has no module for it: the setting counts too.
    dropout = max([getattr(config.model, "dropout", 0.0), *(each.p for each in modules if isinstance(each, _DROPOUTS))])
    reasons = {
        "BatchNorm takes its statistics from each rank's local batch alone": any(
            isinstance(each, _BATCH_NORMS) for each in modules
        ),
        "dropout draws differently for other local batches": dropout > 0,
        "precision bf16 rounds each local batch's activations": parallel.precision == "bf16",
        "precision tf32 rounds each local batch's products": parallel.precision == "tf32",
        "numerics bf16_gradients rounds gradients before they are averaged": parallel.numerics == "bf16_gradients",
    }
    return [
        f"WARNING: another number of ranks will not give the same training: {reason}"
        for reason, holds in reasons.items()
        if holds
    ]
