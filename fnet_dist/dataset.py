"""Fashion-MNIST and the stand-in for it: the file to replace with your own data (README, "Put in your model and data").

Source: Zalando Research, https://github.com/zalandoresearch/fashion-mnist, MIT licence, through torchvision.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from fnet_dist.config.schema import DataConfig
from fnet_dist.data.datasets import Dataset, InMemoryDataset, StreamedDataset
from fnet_dist.data.fashion_mnist import MissingDataError, verified_files
from fnet_dist.data.synthetic import make_synthetic

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def build_dataset(config: DataConfig, split: Literal["train", "test"], device: torch.device) -> Dataset:
    """The samples of `split` on `device`: inputs (n, 1, 28, 28) float32 in [-1, 1], targets (n,) int64 in 0 to 9.

    All of them lie on the device, or with num_workers > 0 they are streamed: the same bits, for sets that do not fit.

    Every rank may call this at the same time: one of them fetches what is missing, the others wait for it. With
    `auto`, the result's `config.dataset` says which data it is. Raises DataError if files are damaged, or missing and
    not to be had.
    """
    name = config.dataset
    if name != "synthetic":
        try:
            images, labels = _read_official(Path(config.root), split)
            name = "fashion-mnist"
        except MissingDataError:
            if name != "auto":
                raise
            name = "synthetic"
    if name == "synthetic":
        images, labels = (torch.from_numpy(array) for array in make_synthetic(split))
    common = _Common(
        name="Fashion-MNIST" if name == "fashion-mnist" else "synthetic data, not Fashion-MNIST",
        is_synthetic=name == "synthetic",
        sha256=_content_sha256(images, labels),
        class_names=CLASS_NAMES,
        config=config.model_copy(update={"dataset": name}),
    )
    if config.num_workers > 0:
        on_cpu = _Images(images.unsqueeze(1), labels, _normalizer(torch.device("cpu")))
        return StreamedDataset(on_cpu, config.num_workers, device, **common)
    return InMemoryDataset(images.unsqueeze(1), labels, _normalizer(device), device, **common)


class _Common(TypedDict):
    """What both carriers are told alike."""

    name: str
    is_synthetic: bool
    sha256: str
    class_names: tuple[str, ...]
    config: DataConfig


@dataclass(frozen=True)
class _Images:
    """The images one by one, as a map-style data set: what DataLoader workers read."""

    images: Tensor
    labels: Tensor
    normalize: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalize(self.images[index]), int(self.labels[index])


def _read_official(root: Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) uint8 and labels (n,) int64, parsed by torchvision from files that were verified just now."""
    images, labels = verified_files(root, split)
    # Not the class FashionMNIST: it reads an old processed/*.pt, verified by nobody, rather than these files.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    return read_image_file(images), read_label_file(labels)


def _content_sha256(images: Tensor, labels: Tensor) -> str:
    """Of all images' bytes, then of all labels', one byte each."""
    content = hashlib.sha256(images.numpy().data)
    content.update(labels.to(torch.uint8).numpy().data)
    return content.hexdigest()


def _normalizer(device: torch.device) -> Callable[[Tensor], Tensor]:
    """ToTensor and Normalize((0.5,), (0.5,)), to the bit: doubling is exact, so (x/255 - 0.5)/0.5 = x/127.5 - 1."""
    # A tensor on the device: CUDA divides by a plain number as a product with its rounded inverse.
    half_range = torch.tensor(127.5, device=device)
    return lambda images: images.div(half_range).sub_(1)
