"""Coloured shapes on noise: images (3, 32, 32) of seven kinds, computed from their index alone."""

import hashlib
from typing import Literal

import torch
from torch import Tensor

from fnet_dist.config.schema import DataConfig
from fnet_dist.data.datasets import Dataset, DatasetInfo, StreamedDataset
from fnet_dist.seeding import derive_seed

CLASS_NAMES = ("disc", "ring", "square", "diamond", "cross", "stripes", "checks")
SIDE = 32


def build_dataset(config: DataConfig, split: Literal["train", "test"], device: torch.device) -> Dataset:
    """Return the samples of `split`: inputs (n, 3, 32, 32) float32 in [-1, 1], targets (n,) int64 in 0 to 6."""
    count = config.train_count if split == "train" else config.test_count
    recipe = f"coloured shapes, {split}, {count} images, noise {config.noise}"
    info = DatasetInfo(
        name="coloured shapes",
        sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        class_names=CLASS_NAMES,
        config=config,
    )
    return StreamedDataset(Shapes(split, count, config.noise), config.num_workers, device, info)


class Shapes(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A bright shape of kind `index % 7` somewhere on a dark ground."""

    def __init__(self, split: str, count: int, noise: float) -> None:
        self.split = split
        self.count = count
        self.noise = noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        kind = index % len(CLASS_NAMES)
        random = torch.Generator().manual_seed(derive_seed(self.split, index))
        ground, colour = torch.rand(2, 3, 1, 1, generator=random)
        radius, x, y = (torch.rand(3, generator=random) * 4 + torch.tensor([9.0, 14.0, 14.0])).tolist()
        inside = draw(CLASS_NAMES[kind], radius, x, y)
        image = torch.where(inside, colour.clamp_min(0.5), ground - 1)
        image = image + self.noise * torch.randn(3, SIDE, SIDE, generator=random)
        return image.clamp(-1, 1), kind


def draw(name: str, radius: float, x: float, y: float) -> Tensor:
    """Return the mask (32, 32) of the shape `name` around (x, y), all in pixels."""
    pixels = torch.arange(SIDE) + 0.5
    v, u = torch.meshgrid((pixels - y) / radius, (pixels - x) / radius, indexing="ij")
    box = torch.maximum(u.abs(), v.abs()) < 0.9
    match name:
        case "disc":
            return u.square() + v.square() < 1
        case "ring":
            return (u.square() + v.square() - 0.7).abs() < 0.3
        case "square":
            return box
        case "diamond":
            return u.abs() + v.abs() < 1.1
        case "cross":
            return box & (torch.minimum(u.abs(), v.abs()) < 0.25)
        case "stripes":
            return box & ((2 * v).floor() % 2 == 0)
        case _:
            return box & (((2 * u).floor() + (2 * v).floor()) % 2 == 0)
