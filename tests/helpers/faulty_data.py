"""A recipe whose data set fails on one rank: --recipe tests.helpers.faulty_data --data.fault FAULT.

FAULT is `none`, `long` (an epoch without end) or WHAT:RANK:CALL, for example `sleep:1:3`: rank 1 sleeps in the third
batch that it reads, in training and evaluation together; batch 0 is when the data set is built, batch 1 the test batch
that is tried before step 1.
"""

import os
import time
from typing import Any

import torch
from torch import Tensor

from fnet_dist.recipe import Classification, Dataset, DatasetInfo, setting
from fnet_dist.recipes import fashion_mnist
from fnet_dist.recipes.fashion_mnist import LossConfig, ModelConfig, build_loss, build_model

__all__ = ["DataConfig", "LossConfig", "ModelConfig", "build_dataset", "build_loss", "build_model", "metrics"]

TRAIN_COUNT, TEST_COUNT = 130, 20

metrics = Classification()


class DataConfig(fashion_mnist.DataConfig):
    fault: str = setting("what fails, where and when", "none")


class Fault:
    """Count the batches that this rank reads and fail at the given one."""

    def __init__(self, text: str) -> None:
        self.what, _, where = text.partition(":")
        rank, _, call = where.partition(":")
        self.at = int(call) if rank == os.environ.get("RANK", "0") else None
        self.read = 0

    def apply_to(self, inputs: Tensor) -> Tensor:
        """Return `inputs`, or apply the fault when it is due."""
        due, self.read = self.read == self.at, self.read + 1
        if due and self.what == "sleep":
            time.sleep(600)
        if due and self.what == "raise":
            raise LookupError("the third shelf is empty")
        return inputs * float("nan") if due and self.what == "nan" else inputs


FAULTS: dict[str, Fault] = {}  # one for both splits


class RandomDataset(Dataset):
    """`count` random images with random labels, of which only the first 130 differ."""

    def __init__(self, config: Any, count: int, fault: Fault) -> None:
        super().__init__(DatasetInfo("random", str(count), class_names=tuple("abcdefghij"), config=config))
        generator = torch.Generator().manual_seed(count)
        self.count = count
        self.inputs = torch.randn(min(count, TRAIN_COUNT), 784, generator=generator)
        self.targets = torch.randint(10, (len(self.inputs),), generator=generator)
        self.fault = fault

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        indices = indices % len(self.inputs)
        return self.fault.apply_to(self.inputs[indices]), self.targets[indices]


def build_dataset(config: DataConfig, split: str, device: torch.device) -> Dataset:
    """Return 130 training samples (a million for `long`) or 20 test samples."""
    fault = FAULTS.setdefault(config.fault, Fault(config.fault))
    if split == "test":
        return RandomDataset(config, TEST_COUNT, fault)
    fault.apply_to(torch.zeros(0))
    return RandomDataset(config, 1_000_000 if fault.what == "long" else TRAIN_COUNT, fault)
