"""Choose the samples of each step: the same global batches at any number of ranks, each sample once an epoch."""

from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from fnet_dist.config.batch_split import batches
from fnet_dist.seeding import derive_seed


class Microbatch(NamedTuple):
    """The samples of a rank's local batch that go through the model at once.

    If no sample is left for it, `indices` holds one placeholder and `samples` is 0: every rank must run the same
    collectives, and the trainer gives the placeholder weight 0.
    """

    indices: Tensor  # (n,) int64, never empty
    samples: int


class StepBatch(NamedTuple):
    """One rank's part of a global batch: its microbatches, and the number of samples in the whole global batch."""

    microbatches: tuple[Microbatch, ...]
    global_samples: int


_BATCHES_AT_ONCE = 1024


class GlobalBatchSampler(DistributedSampler[int]):
    """A DistributedSampler without padding that yields tensors of indices, and knows its epoch and position.

    The permutation of an epoch derives from (seed, epoch). Global batch k is permutation[k*G:(k+1)*G], where G is
    `global_batch_size`, whatever the world size. It is dealt out to `shards` (by default one for each rank): shard s
    gets the samples s, s + shards, s + 2 * shards, ..., and is cut into `microbatches`. Every rank has equally many
    consecutive shards.
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
        drop_last: bool = False,
        sample_weights: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Yield indices on `device`, where an epoch's order is copied once; by default they stay on the CPU."""
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]  # torch declares Dataset, but uses only its length
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = batches(len(dataset), global_batch_size, drop_last)
        self.samples_per_epoch = min(len(dataset), self.steps_per_epoch * global_batch_size)
        self._count = len(dataset)
        self._cumulative = None if sample_weights is None else sample_weights.double().cpu().cumsum(0)
        self.microbatches = microbatches
        self.device = device or torch.device("cpu")
        self.shards = shards or world_size
        per_rank = self.shards // world_size
        self._local_shards = range(rank * per_rank, (rank + 1) * per_rank)
        self.first_batch = 0

    @property
    def sample_key(self) -> int:
        """Return the key of the samples' random draws in this epoch (see Dataset)."""
        return derive_seed(self.seed, "samples", self.epoch)

    @property
    def last_local_batches(self) -> set[int]:
        """Return the sizes of the microbatches of an epoch's last global batch, over all ranks, without empty ones."""
        size = self.samples_per_epoch - (self.steps_per_epoch - 1) * self.global_batch_size
        shards = (len(range(shard, size, self.shards)) for shard in range(self.shards))
        parts = (len(range(part, shard, self.microbatches)) for shard in shards for part in range(self.microbatches))
        return {part for part in parts if part}

    @property
    def micro_batch_size(self) -> int:
        """Return the most samples that go through the model at once, on any rank."""
        return -(-self.global_batch_size // (self.shards * self.microbatches))

    def describe(self, data_name: str, device: str) -> str:
        """Return one line for the user: how a global batch is split."""
        ranks = f"{self.num_replicas} rank{'s' * (self.num_replicas > 1)}"
        shards = f" x {len(self._local_shards)} shards" if len(self._local_shards) > 1 else ""
        microbatches = f"{shards} x {self.microbatches} microbatches" if self.microbatches > 1 else shards
        most = "" if self.global_batch_size % (self.shards * self.microbatches) == 0 else "at most "
        return (
            f"{data_name}: {self.samples_per_epoch:,} samples, {self.steps_per_epoch:,} steps an epoch; global "
            f"batch {self.global_batch_size:,} = {ranks}{microbatches} x {most}{self.micro_batch_size:,}, on {device}"
        )

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Move to `epoch` (from 1), after the `first_batch` global batches that are done already."""
        self.set_epoch(epoch)  # torch's: sets self.epoch
        self.first_batch = first_batch

    def permutation(self) -> Tensor:
        """Return the order of samples in the epoch, int64 (samples,), of which the first `samples_per_epoch` are used.

        With sample weights, samples are drawn with replacement.
        """
        if not self.shuffle:
            return torch.arange(self._count)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        if self._cumulative is None:
            return torch.randperm(self._count, generator=generator)
        # Not torch.multinomial, which takes at most 2^24 samples. `right`: a sample of weight 0 is never drawn.
        draws = torch.rand(self._count, dtype=torch.float64, generator=generator) * self._cumulative[-1]
        below_total = self._cumulative[-1].nextafter(draws.new_zeros(()))  # where the product was rounded up
        return torch.searchsorted(self._cumulative, draws.clamp_max(below_total), right=True)

    def steps(self) -> Iterator[StepBatch]:
        """Yield this rank's part of each global batch, from the position to the end of the epoch."""
        used, size = self.permutation()[: self.samples_per_epoch].to(self.device), self.global_batch_size
        whole = self.samples_per_epoch // size
        # Many batches at once: a slice for each would take 2 us a step. Not all: a run may end within the epoch.
        for first in range(self.first_batch, whole, _BATCHES_AT_ONCE):
            batches = used[first * size : min(first + _BATCHES_AT_ONCE, whole) * size].view(-1, size)
            columns = [self._microbatches(batches, part) for part in self._parts(batches)]
            yield from (StepBatch(microbatches, size) for microbatches in zip(*columns, strict=True))
        if self.first_batch * size < len(used) and len(rest := used[max(whole, self.first_batch) * size :]):
            batches = rest.view(1, -1)
            [microbatches] = zip(*(self._microbatches(batches, part) for part in self._parts(batches)), strict=True)
            yield StepBatch(microbatches, len(rest))

    def global_batch(self, number: int) -> Tensor:
        """Return the indices of the epoch's global batch `number`, counted from 0: int64 (samples,)."""
        first = number * self.global_batch_size
        return self.permutation()[: self.samples_per_epoch][first : first + self.global_batch_size]

    def _parts(self, batches: Tensor) -> list[Tensor]:
        """Return this rank's microbatches of several global batches of one size: columns of `batches` (n, size)."""
        # With a stride, shards of a last, smaller batch differ by one sample at most.
        parts = [batches[:, shard :: self.shards] for shard in self._local_shards]
        if self.microbatches > 1:
            parts = [part for shard in parts for part in shard.tensor_split(self.microbatches, dim=1)]
        return parts

    def _microbatches(self, batches: Tensor, part: Tensor) -> list[Microbatch]:
        """Return `part`, (n, samples), as one microbatch for each of n global batches; an empty one reads a sample."""
        count = part.shape[1]
        return [Microbatch(indices, count) for indices in (part if count else batches[:, :1]).unbind()]

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices one by one, as torch's own sampler does."""
        for step in self.steps():
            for microbatch in step.microbatches:
                yield from microbatch.indices[: microbatch.samples].tolist()

    def __len__(self) -> int:
        """Return the number of indices that `__iter__` yields."""
        return sum(microbatch.samples for step in self.steps() for microbatch in step.microbatches)
