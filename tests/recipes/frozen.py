"""A frozen backbone with a trained head, a parameter that the loss does not reach, and groups of parameters."""

import torch
from torch import Tensor, nn

from fnet_dist.recipe import Classification, DataConfig, Dataset, DatasetInfo, PositiveInt, Section, setting

__all__ = ["DataConfig"]

metrics = Classification()


class ModelConfig(Section):
    features: PositiveInt = setting("outputs of the backbone", 12)


class Points(Dataset):
    """A data set of its own kind: it returns whole batches, of nested inputs."""

    def __init__(self, split: str) -> None:
        super().__init__(DatasetInfo("points", split, ("left", "right")))
        generator = torch.Generator().manual_seed(len(split))
        points = torch.randn(150 if split == "train" else 43, 4, generator=generator, dtype=torch.float64)
        self.points, self.sides = points.to(torch.get_default_dtype()), (points[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.sides)

    def batch(self, indices: Tensor, key: int) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        chosen = self.points[indices]
        return {"halves": (chosen[:, :2], chosen[:, 2:])}, self.sides[indices]


def build_dataset(config: DataConfig, split: str, device: torch.device) -> Points:
    return Points(split)


class HeadOnBackbone(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, features).requires_grad_(False)
        self.head = nn.Linear(features, classes)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, inputs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        return self.head(self.backbone(torch.cat(inputs["halves"], dim=1)).relu())


def build_model(config: ModelConfig, train_data: Points) -> nn.Module:
    return HeadOnBackbone(config.features, len(train_data.info.class_names))


def parameter_groups(model: HeadOnBackbone, config: ModelConfig) -> list[dict[str, object]]:
    return [
        {"params": [model.head.weight, model.unused], "weight_decay": 0.1},
        {"params": [model.head.bias], "lr_scale": 2.0},
    ]
