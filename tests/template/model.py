"""A small convolutional network for coloured shapes."""

import torch.nn.functional as F
from torch import Tensor, nn

from fnet_dist.config.schema import ModelConfig
from fnet_dist.dataset import CLASS_NAMES


def build_model(config: ModelConfig) -> nn.Module:
    """The network on the CPU, its weights drawn from torch's default random stream."""
    return ConvNet(config.channels, config.norm)


class ConvNet(nn.Module):
    """Images (n, 3, 32, 32) -> logits (n, classes)."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()
        self.norm2 = nn.BatchNorm2d(2 * channels) if norm == "batch" else nn.Identity()
        self.output = nn.Linear(2 * channels * 8 * 8, len(CLASS_NAMES))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))  # (n, channels, 32, 32)
        x = F.max_pool2d(x, 2)
        x = F.relu(self.norm2(self.conv2(x)))  # (n, 2 channels, 16, 16)
        x = F.max_pool2d(x, 2)
        logits: Tensor = self.output(x.flatten(1))
        return logits
