"""Which samples a step takes: the same global batches at any number of ranks, each sample once an epoch."""

from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from fnet_dist.seeding import derive_seed


class Microbatch(NamedTuple):
    """A part of a rank's share that goes through the model at once.

    `indices` (n,) int64 is never empty: where no sample is left it holds one stand-in, whose `samples` is 0, so that
    every rank runs the same collectives and the stand-in counts for nothing.
    """

    indices: Tensor
    samples: int


class StepBatch(NamedTuple):
    """One rank's part of a step: its pieces, and the number of samples in the whole global batch."""

    microbatches: tuple[Microbatch, ...]
    global_samples: int


class GlobalBatchSampler(DistributedSampler[int]):
    """A DistributedSampler without padding, whose index is a tensor and which owns epoch and position.

    The permutation of an epoch derives from (seed, epoch); global batch k is permutation[k*G:(k+1)*G] whatever the
    world size. Of `shards` (one a rank if left out), shard s is every shards-th sample of it, from s on, cut into
    `pieces` parts; rank r has as many as all others, one after the other.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        microbatches: int = 1,
        shards: int | None = None,
        shuffle: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]  # torch asks for more than the length it uses
        self.samples_per_epoch = len(dataset)
        self.global_batch_size = global_batch_size
        self.microbatches = microbatches
        self.shards = shards or world_size
        own = self.shards // world_size
        self._own = range(rank * own, (rank + 1) * own)
        self.first_batch = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.global_batch_size)

    @property
    def micro_batch_size(self) -> int:
        """The most samples that go through the model at once, on any rank."""
        return -(-self.global_batch_size // (self.shards * self.microbatches))

    def describe(self, data_name: str, device: str) -> str:
        """The arithmetic of a batch, for people."""
        ranks = f"{self.num_replicas} rank{'s' * (self.num_replicas > 1)}"
        shards = f" x {len(self._own)} shards" if len(self._own) > 1 else ""
        microbatches = f"{shards} x {self.microbatches} pieces" if self.microbatches > 1 else shards
        most = "" if self.global_batch_size % (self.shards * self.microbatches) == 0 else "at most "
        return (
            f"{data_name}: {self.samples_per_epoch:,} samples, {self.steps_per_epoch:,} steps an epoch; global "
            f"batch {self.global_batch_size:,} = {ranks}{microbatches} x {most}{self.micro_batch_size:,}, on {device}"
        )

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Go to `epoch` (from 1), after `first_batch` global batches that are done already."""
        self.set_epoch(epoch)
        self.first_batch = first_batch

    def permutation(self) -> Tensor:
        """The epoch's order, int64 (samples_per_epoch,)."""
        if not self.shuffle:
            return torch.arange(self.samples_per_epoch)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.samples_per_epoch, generator=generator)

    def steps(self) -> Iterator[StepBatch]:
        """This rank's part of each global batch, from the position to the epoch's end."""
        permutation = self.permutation()
        for start in range(self.first_batch * self.global_batch_size, self.samples_per_epoch, self.global_batch_size):
            batch = permutation[start : start + self.global_batch_size]
            shares = [batch[shard :: self.shards] for shard in self._own]
            if self.microbatches > 1:
                shares = [part for share in shares for part in share.tensor_split(self.microbatches)]
            yield StepBatch(tuple(_piece(part, batch) for part in shares), global_samples=len(batch))

    def __iter__(self) -> Iterator[int]:
        """Every index of this rank's shares, one by one, as torch's own sampler gives them."""
        for step in self.steps():
            for microbatch in step.microbatches:
                yield from microbatch.indices[: microbatch.samples].tolist()

    def __len__(self) -> int:
        """How many indices `__iter__` gives."""
        batches = range(self.first_batch * self.global_batch_size, self.samples_per_epoch, self.global_batch_size)
        ends = (min(start + self.global_batch_size, self.samples_per_epoch) for start in batches)
        return sum(
            len(range(start + shard, end, self.shards))
            for start, end in zip(batches, ends, strict=True)
            for shard in self._own
        )


def _piece(part: Tensor, batch: Tensor) -> Microbatch:
    return Microbatch(part, len(part)) if len(part) else Microbatch(batch[:1], 0)
