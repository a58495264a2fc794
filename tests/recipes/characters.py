"""A character transformer: targets are (batch, time), the metric is perplexity."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnet_dist.recipe import DataConfig, DatasetInfo, InMemoryDataset, Language, PositiveInt, Section, setting

__all__ = ["DataConfig"]

TEXT = "the quick brown fox jumps over the lazy dog while five boxing wizards watch. " * 60
TIME = 12
VOCABULARY = sorted({*TEXT})
metrics = Language()


class ModelConfig(Section):
    width: PositiveInt = setting("features of a character", 16)


def build_dataset(config: DataConfig, split: str, device: torch.device) -> InMemoryDataset:
    text = TEXT[:3300] if split == "train" else TEXT[3300:]
    codes = torch.tensor([VOCABULARY.index(letter) for letter in text])
    samples = codes[: len(codes) // (TIME + 1) * (TIME + 1)].view(-1, TIME + 1)
    info = DatasetInfo("pangrams", hashlib.sha256(text.encode()).hexdigest())
    return InMemoryDataset(samples[:, :-1], samples[:, 1:], device, info)


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(VOCABULARY), width), nn.Embedding(TIME, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.output = nn.Linear(width, len(VOCABULARY))
        self.output.weight = self.letters.weight

    def forward(self, codes: Tensor) -> Tensor:
        x = self.letters(codes) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=x.dtype)
        return self.output(self.block(x, src_mask=mask, is_causal=True))


def build_model(config: ModelConfig, train_data: InMemoryDataset) -> nn.Module:
    return Transformer(config.width)


def build_loss(config: Section, train_data: InMemoryDataset):
    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
        return total, total.new_full((), targets.numel())

    return loss
