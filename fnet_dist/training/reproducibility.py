"""Reproducibility of a run: the manifest of everything it depends on, and warnings about what makes it inexact."""

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fnet_dist import __version__
from fnet_dist.config.load import result_settings
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.device import compute_conditions
from fnet_dist.distributed.process_group import Group
from fnet_dist.metrics import Metrics, directions
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run.git import git_state
from fnet_dist.versions import library_version

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def build_manifest(
    config: Config,
    group: Group,
    train_data: Dataset,
    test_data: Dataset,
    metrics: Sequence[Metrics],
    sources: Mapping[str, str],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the contents of manifest.json besides the run's id and origin; `before` are those of the last attempt."""
    conditions = {
        **compute_conditions(group.device),
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".strip(),
        "threads": torch.get_num_threads(),  # a sum is split over the threads
        "compile": config.parallel.compile,
    }
    last = (before or {}).get("conditions", conditions)
    names = directions(metrics)
    # importlib.metadata would read each NAME-VERSION.dist-info: 0.1 s.
    installed = sorted({path.name for folder in sys.path for path in Path(folder).glob("*.dist-info")})
    return {
        # Besides the settings, the bits depend on these: a resume that changes one prints a warning.
        "conditions": conditions,
        "conditions_changed": [
            f"{key} {new}, before {last.get(key)}" for key, new in conditions.items() if last.get(key) != new
        ],
        "receipt": {
            "code": _sha256(*(f"{name}\0{digest}" for name, digest in sources.items())),
            "data": _sha256(train_data.info.sha256, test_data.info.sha256),
            "config": _sha256(*(f"{name}={value}" for name, value in sorted(result_settings(config).items()))),
            "environment": _sha256(platform.python_version(), *installed),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": library_version("torch"),
            "torchvision": library_version("torchvision"),
            "fnet_dist": __version__,
        },
        "git": git_state(CODE_ROOT),
        # Of an evaluation: which direction is better, and the one that tells the best.
        "metrics": names,
        "monitor": config.run.monitor or next(iter(names), "loss"),
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
        "flush_denormal": group.device.type == "cpu",  # by set_arithmetic, on every rank; it changes bits
    }


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def reproducibility_warnings(model: nn.Module, config: Config) -> list[str]:
    """Return a warning for each part of the model and settings that makes training inexact; [] for an exact run."""
    parallel = config.parallel
    if parallel.numerics == "invariant":
        return []
    model.train()  # a module that stays in evaluation mode is frozen
    modules = list(model.modules())
    # The functional form of the model calls F.dropout and has no module for it: the setting counts too.
    rates = [getattr(config.model, "dropout", 0.0), *(each.p for each in modules if isinstance(each, _DROPOUT))]
    has_batch_norm = any(map(has_batch_statistics, modules))
    reasons = {
        "BatchNorm takes its statistics from each rank's local batch alone": has_batch_norm,
        "dropout draws differently for other local batches": max(rates) > 0,
        "precision bf16 rounds each local batch's activations": parallel.precision == "bf16",
        "precision tf32 rounds each local batch's products": parallel.precision == "tf32",
        "numerics bf16_gradients rounds gradients before they are averaged": parallel.numerics == "bf16_gradients",
    }
    warning = "another number of ranks will not give the same training: "
    return [warning + reason for reason, holds in reasons.items() if holds]


def has_batch_statistics(module: nn.Module) -> bool:
    """Return True if `module` is a BatchNorm that trains on the statistics of each rank's own batch."""
    return module.training and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)  # not SyncBatchNorm
