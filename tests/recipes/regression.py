"""A regression with two targets a sample, and a metric of its own."""

from types import MappingProxyType

import torch
from torch import Tensor, nn

from fnet_dist.recipe import DataConfig, DatasetInfo, InMemoryDataset, PositiveInt, Regression, Section, setting

__all__ = ["DataConfig"]


class WithinHalf:
    """The fraction of targets within 0.5."""

    better = MappingProxyType({"within_half": "higher"})

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        close = (outputs - targets).abs() < 0.5
        return {"close": close.sum(), "count": torch.tensor(close.numel())}

    def values(self, sums: dict[str, float]) -> dict[str, float]:
        return {"within_half": sums["close"] / sums["count"]}


metrics = (Regression(), WithinHalf())


class ModelConfig(Section):
    hidden: PositiveInt = setting("hidden units", 16)


def build_dataset(config: DataConfig, split: str, device: torch.device) -> InMemoryDataset:
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    inputs = torch.randn(203 if split == "train" else 61, 5, generator=generator, dtype=torch.float64)
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], inputs.sum(1).sin()], dim=1)
    kind = torch.get_default_dtype()
    return InMemoryDataset(inputs.to(kind), targets.to(kind), device, DatasetInfo("products and sines", split))


def build_model(config: ModelConfig, train_data: InMemoryDataset) -> nn.Module:
    return nn.Sequential(nn.Linear(5, config.hidden), nn.Tanh(), nn.Linear(config.hidden, 2))


def build_loss(config: Section, train_data: InMemoryDataset) -> "SquaredError":
    return SquaredError()


class SquaredError:
    weight_is_count = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - targets).square().mean(1).sum(), outputs.new_full((), len(targets))
