"""Samples of different lengths, padded by collate, drawn with weights and masked at random."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fnet_dist.recipe import Classification, DatasetInfo, Section, StreamedDataset, setting
from fnet_dist.recipe import DataConfig as BaseDataConfig

metrics = Classification()


class DataConfig(BaseDataConfig):
    num_workers: int = setting("DataLoader workers per rank", 0, ge=0, changes_result=False)


class ModelConfig(Section):
    pass


class Sequences:
    """Numbers whose sum is above or below zero; in training one of them is left out at random."""

    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.is_training = split == "train"
        lengths = torch.randint(2, 9, (140 if self.is_training else 37,), generator=generator).tolist()
        self.samples = [torch.randn(n, generator=generator).to(torch.get_default_dtype()) for n in lengths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        target = int(sample.sum() > 0)
        if self.is_training:
            left_out = torch.randint(len(sample), ())
            sample = torch.cat([sample[:left_out], sample[left_out + 1 :]])
        return sample, target


def collate(samples: list[tuple[Tensor, int]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    numbers, targets = zip(*samples, strict=True)
    lengths = torch.tensor([len(each) for each in numbers])
    return (pad_sequence(list(numbers), batch_first=True), lengths), torch.tensor(targets)


def build_dataset(config: DataConfig, split: str, device: torch.device) -> StreamedDataset:
    samples = Sequences(split)
    weights = torch.tensor([1.0 + index % 3 for index in range(len(samples))]) if samples.is_training else None
    info = DatasetInfo("sequences", hashlib.sha256(split.encode()).hexdigest(), ("below", "above"))
    return StreamedDataset(samples, config.num_workers, device, info, collate=collate, sample_weights=weights)


class MeanAndMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        numbers, lengths = inputs
        total = numbers.sum(1)
        return self.layers(torch.stack([total, total / lengths, numbers.amax(1)], dim=1))


def build_model(config: ModelConfig, train_data: StreamedDataset) -> nn.Module:
    return MeanAndMore()
