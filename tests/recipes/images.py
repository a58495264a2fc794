"""A small ResNet with GroupNorm on image files, with random crops and flips."""

import hashlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from fnet_dist.recipe import Classification, DatasetInfo, PathText, PositiveInt, Section, StreamedDataset, setting
from fnet_dist.recipe import DataConfig as BaseDataConfig

metrics = Classification(top=(2,))


class DataConfig(BaseDataConfig):
    root: PathText = setting("directory with a folder of PNG files for each split and class", changes_result=False)
    num_workers: int = setting("DataLoader workers per rank", 1, ge=0, changes_result=False)


class ModelConfig(Section):
    width: PositiveInt = setting("channels", 8)


class Images(torch.utils.data.Dataset):
    def __init__(self, folder: Path, transform: v2.Transform) -> None:
        self.classes = sorted(path.name for path in folder.iterdir())
        self.files = [(file, k) for k, name in enumerate(self.classes) for file in sorted((folder / name).iterdir())]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return self.transform(pil_to_tensor(Image.open(file))), label


def build_dataset(config: DataConfig, split: str, device: torch.device) -> StreamedDataset:
    augment = [v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip()] if split == "train" else []
    images = Images(
        Path(config.root) / split, v2.Compose([*augment, v2.ToDtype(torch.get_default_dtype(), scale=True)])
    )
    sha256 = hashlib.sha256("".join(f"{path.name} {path.stat().st_size}" for path, _ in images.files).encode())
    info = DatasetInfo("coloured squares", sha256.hexdigest(), tuple(images.classes))
    return StreamedDataset(images, config.num_workers, device, info)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()


def build_model(config: ModelConfig, train_data: StreamedDataset) -> nn.Module:
    classes = len(train_data.info.class_names)
    stem, pool = nn.Conv2d(3, config.width, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        stem, Block(config.width), Block(config.width), pool, nn.Flatten(), nn.Linear(config.width, classes)
    )
