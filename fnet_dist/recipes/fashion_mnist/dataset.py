"""Fashion-MNIST, or synthetic data in its shapes.

Source: Zalando Research, https://github.com/zalandoresearch/fashion-mnist, MIT licence, through torchvision.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fnet_dist.recipe import Dataset, DatasetInfo, InMemoryDataset, StreamedDataset, sample_random
from fnet_dist.recipes.fashion_mnist.download import MissingDataError, fetch_for_run
from fnet_dist.recipes.fashion_mnist.files import read_official
from fnet_dist.recipes.fashion_mnist.settings import DataConfig
from fnet_dist.recipes.fashion_mnist.synthetic import make_synthetic

SHIFT = 2  # pixels
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def build_dataset(config: DataConfig, split: Literal["train", "test"], device: torch.device) -> Dataset:
    """Return the samples of `split`: inputs (n, 1, 28, 28) float32 in [-1, 1], targets (n,) int64 in 0 to 9.

    They are kept on `device`, or streamed if num_workers > 0: the same bits, for data that does not fit.
    All ranks may call this at the same time: one downloads missing files while the others wait. With `auto`, the
    result's `info.config.dataset` is the choice made. Raises DataError if files are damaged or cannot be downloaded.
    """
    name = config.dataset
    if name != "synthetic":
        try:
            root, part = Path(config.root), "train" if split == "train" else "t10k"
            fetch_for_run(root)
            # Not by torchvision, whose import takes two seconds of a start. The sha256 has told that these are the
            # official files: a header of 16 or 8 bytes, then a byte for each pixel or label.
            file = read_official(root, f"{part}-labels-idx1-ubyte")
            labels = torch.frombuffer(file, dtype=torch.uint8, offset=8).long()
            file = read_official(root, f"{part}-images-idx3-ubyte")
            images = torch.frombuffer(file, dtype=torch.uint8, offset=16).view(-1, 28, 28)
            name = "fashion-mnist"
        except MissingDataError:
            if name != "auto":
                raise
            name = "synthetic"
    if name == "synthetic":
        images, labels = (torch.from_numpy(array) for array in make_synthetic(split))
    content = hashlib.sha256(images.numpy().data)  # all images' bytes, then all labels', one byte each
    content.update(labels.to(torch.uint8).numpy().data)
    info = DatasetInfo(
        name="Fashion-MNIST" if name == "fashion-mnist" else "synthetic data, not Fashion-MNIST",
        sha256=content.hexdigest(),
        class_names=CLASS_NAMES,
        config=config.model_copy(update={"dataset": name}),
        is_synthetic=name == "synthetic",
    )
    images = images.unsqueeze(1)  # one channel
    transform = _transform(device, augment=config.augment and split == "train")
    if config.num_workers > 0:
        return StreamedDataset(_Samples(images, labels), config.num_workers, device, info, transform=transform)
    return InMemoryDataset(images, labels, device, info, transform=transform)


@dataclass(frozen=True)
class _Samples:
    """A map-style data set of single images, for DataLoader workers."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def _transform(device: torch.device, *, augment: bool) -> Callable[[Tensor, int, Tensor], Tensor]:
    """Return ToTensor and Normalize((0.5,), (0.5,)) in one, bit-identical: (x/255 - 0.5)/0.5 = x/127.5 - 1."""
    # A tensor on the device: CUDA would divide by a plain number by multiplying with its rounded inverse.
    half_range = torch.tensor(127.5, device=device)

    def transform(images: Tensor, key: int, indices: Tensor) -> Tensor:
        if augment:
            images = flip_and_shift(images, sample_random(key, indices, 3))
        return images.div(half_range).sub_(1)

    return transform


def flip_and_shift(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror half of the images (n, 1, side, side) and shift each by up to SHIFT pixels, as `draws` (n, 3) say."""
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    columns = torch.where(draws[:, :1] < 0.5, pixels, pixels.flip(0))  # (n, side)
    down, right = (draws[:, 1:] * (2 * SHIFT + 1)).long().unsqueeze(-1).unbind(1)  # 0 to 2 SHIFT, (n, 1) each
    padded = F.pad(images, [SHIFT] * 4)  # with black
    sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return padded[sample, 0, (pixels + down).unsqueeze(2), (columns + right).unsqueeze(1)].unsqueeze(1)
