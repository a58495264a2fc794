"""The recipe of the PyTorch cookbook chapter: Fashion-MNIST, or data in its shapes, and a network 784-256-128-10.

Functions import what needs torch when they are called: `fnet status` or `fnet submit` then do not wait for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fnet_dist.metrics import Classification
from fnet_dist.processes import quoted
from fnet_dist.recipes.fashion_mnist.files import contents, verify
from fnet_dist.recipes.fashion_mnist.settings import DataConfig, LossConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fnet_dist.recipe import Dataset, Loss

__all__ = [
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "build_dataset",
    "build_loss",
    "build_model",
    "has_real_data",
    "metrics",
    "missing_data",
]

metrics = Classification()


def build_dataset(config: DataConfig, split: Literal["train", "test"], device: "torch.device") -> "Dataset":
    """Return the samples of `split`: inputs (n, 1, 28, 28) float32 in [-1, 1], targets (n,) int64 in 0 to 9."""
    from fnet_dist.recipes.fashion_mnist import dataset

    return dataset.build_dataset(config, split, device)


def build_model(config: ModelConfig, train_data: "Dataset") -> "nn.Module":
    """Return the network, its weights drawn from torch's default random stream."""
    from fnet_dist.recipes.fashion_mnist import model

    return model.build_model(config)


def build_loss(config: LossConfig, train_data: "Dataset") -> "Loss":
    """Return the negative log-likelihood or the cross-entropy."""
    from fnet_dist.loss import build_classifier_loss

    return build_classifier_loss(config, train_data)


def has_real_data(config: DataConfig) -> bool:
    """Return True if `auto` finds the official files without a download."""
    return config.dataset == "auto" and not any(verify(Path(config.root)).values())


def missing_data(config: DataConfig) -> str | None:
    """Return what is wrong with the official files and how to get them; None if they are good."""
    if config.dataset != "fashion-mnist":
        return None
    root = Path(config.root)
    path, fault = next((item for item in verify(root).items() if item[1]), (root, None))
    if fault is None:
        return None
    return (
        f"data.root: {path}: {fault} ({contents(root)}); on a node with internet, into a directory of all nodes: "
        f"fnet data fetch --root {quoted(root)}; or name another (--data.root, FNET_DATA, data_root in site.toml)"
    )
