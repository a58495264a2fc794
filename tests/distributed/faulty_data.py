"""A user's data.py, and a fault that one rank meets in it: what a rank of test_failures.py runs.

    python -m tests.distributed.faulty_data FAULT --config JOBFILE ...

FAULT is `none`, or WHAT:RANK:CALL, for example `sleep:1:3`: rank 1 sleeps in its third batch. This module stands in the
place of fnet_dist.data, where a user would put his own; nothing else of the package is touched.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor

from fnet_dist.batching import Dataset
from fnet_dist.errors import DataError
from fnet_dist.train import main

TRAIN_COUNT, TEST_COUNT = 130, 20


class FaultyDataset(Dataset):
    """Random pixels; `fault` says what happens in which call of `batch` on which rank."""

    def __init__(self, config: Any, count: int, fault: str) -> None:
        super().__init__(name="random", sha256="0" * 64, class_names=tuple("abcdefghij"), config=config)
        generator = torch.Generator().manual_seed(count)
        self.inputs = torch.randn(count, 784, generator=generator)
        self.targets = torch.randint(10, (count,), generator=generator)
        self.what, rank, call = (fault if ":" in fault else "none:0:0").split(":")
        self.at = int(call) if rank == os.environ.get("RANK", "0") else 0
        self.calls = 0

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        inputs = self.inputs[indices]
        if self.calls == self.at:
            if self.what == "sleep":
                time.sleep(600)
            if self.what == "raise":
                raise LookupError("the third shelf is empty")
            if self.what == "nan":
                inputs = inputs * float("nan")
        return inputs, self.targets[indices]


def build_dataset(config: Any, split: str, device: torch.device) -> Dataset:
    """The random data; the fault is met in training, or with `build_...` here."""
    fault = sys.argv[1]
    if fault == f"build_refuse:{os.environ.get('RANK', '0')}:0":
        raise DataError("the file shelf3 is damaged")
    if fault == f"build_crash:{os.environ.get('RANK', '0')}:0":
        raise LookupError("the file shelf3 has no index")
    if split == "train":
        return FaultyDataset(config, TRAIN_COUNT, fault.removeprefix("test_") if "test_" not in fault else "none")
    return FaultyDataset(config, TEST_COUNT, fault.removeprefix("test_") if "test_" in fault else "none")


if __name__ == "__main__":
    sys.modules["fnet_dist.data"] = sys.modules[__name__]
    sys.exit(main(sys.argv[2:]))
