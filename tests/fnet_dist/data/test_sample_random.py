"""Random draws of a sample depend on seed, epoch and index: not on ranks, workers, order or attempts."""

import multiprocessing
import random

import numpy as np
import pytest
import torch

from fnet_dist.data.datasets import DatasetInfo, StreamedDataset
from fnet_dist.data.sampler import GlobalBatchSampler
from fnet_dist.recipes.fashion_mnist.dataset import flip_and_shift
from fnet_dist.seeding import derive_seed, sample_random

CPU = torch.device("cpu")
INFO = DatasetInfo("draws", sha256="")
COUNT = 60


class Draws:
    """Sample i is what a random transform would draw from the three default generators."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64), index


def key(seed, epoch):
    sampler = GlobalBatchSampler(range(COUNT), global_batch_size=8, seed=seed)
    sampler.set_position(epoch)
    return sampler.sample_key


def read(workers=0, seed=0, epoch=1, rank=0, ranks=1):
    """Return {index: draws} of one epoch on one rank."""
    sampler = GlobalBatchSampler(range(COUNT), global_batch_size=8, seed=seed, rank=rank, world_size=ranks)
    sampler.set_position(epoch)
    dataset = StreamedDataset(Draws(), workers, CPU, INFO)
    indices = (microbatch.indices for step in sampler.steps() for microbatch in step.microbatches)
    try:
        batches = [
            (draws.tolist(), targets.tolist()) for draws, targets in dataset.batches(indices, sampler.sample_key)
        ]
    finally:
        dataset.close()
    return {index: tuple(row) for draws, targets in batches for row, index in zip(draws, targets, strict=True)}


@pytest.fixture(scope="module")
def alone():
    return read()


def test_draws_differ_between_samples_epochs_and_seeds(alone):
    for other in (read(epoch=2), read(seed=1)):
        assert other.keys() == alone.keys()
        for place in range(3):
            assert not {row[place] for row in other.values()} & {row[place] for row in alone.values()}
    for place in range(3):
        assert len({row[place] for row in alone.values()}) == COUNT


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_draws_are_the_same_at_any_number_of_ranks_and_workers(alone, ranks, workers):
    together = {}
    for rank in range(ranks):
        together |= read(workers, rank=rank, ranks=ranks)
    assert together == alone
    assert multiprocessing.active_children() == []


def test_workers_live_through_the_run_and_read_a_data_set_that_cannot_be_pickled():
    class Local(Draws):
        transform = staticmethod(lambda value: value)

        def __getitem__(self, index):
            return torch.tensor(multiprocessing.current_process().pid), self.transform(index)

    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's own
    dataset = StreamedDataset(Local(), 2, CPU, INFO)
    try:
        epochs = [{pid for pids, _ in dataset.batches(torch.arange(12).split(2), key(0, n)) for pid in pids.tolist()}
                  for n in (1, 2)]  # fmt: skip
        stopped = dataset.batches(torch.arange(COUNT).split(2), 3)
        next(stopped)
        stopped.close()  # what is left of this reading does not reach the next one
        _, targets = next(dataset.batches(torch.arange(COUNT).flip(0).split(2), 4))
        assert targets.tolist() == [COUNT - 1, COUNT - 2]
    finally:
        dataset.close()
        multiprocessing.set_start_method(None, force=True)
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 2


def test_sample_random_is_a_function_of_key_and_index_alone():
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    draws = sample_random(5, indices, 3)
    assert (draws.shape, draws.dtype) == ((1000, 3), torch.float32)
    assert torch.equal(sample_random(5, indices[100:200], 3), draws[100:200])
    assert torch.equal(sample_random(5, indices, 2), draws[:, :2])
    for key in (6, 5 + 2**40, -5, 2**64 - 1):
        assert (sample_random(key, indices, 3) == draws).float().mean() < 0.01
    assert 0 <= draws.min() < draws.max() < 1


def test_sample_random_is_uniform_and_uncorrelated():
    draws = sample_random(derive_seed(0, "samples", 1), torch.arange(200_000), 4).double()
    assert draws.mean(0).sub(0.5).abs().max() < 0.003  # four standard errors
    counts = torch.histc(draws[:, 0], 100, 0, 1)
    assert ((counts - 2000).square() / 2000).sum() < 160  # chi-squared of 99 degrees
    neighbours = torch.cat([draws[:-1], draws[1:]], dim=1).T
    assert (torch.corrcoef(neighbours) - torch.eye(8, dtype=torch.float64)).abs().max() < 0.012


def test_flip_and_shift_move_each_image_by_its_own_draws():
    images = torch.arange(1, 2 * 36 + 1, dtype=torch.uint8).view(2, 1, 6, 6)
    still = 2.5 / 5  # no shift: the third of five places
    same = flip_and_shift(images, torch.tensor([[0.1, still, still]] * 2))
    assert torch.equal(same, images)
    moved = flip_and_shift(images, torch.tensor([[0.9, still, still], [0.1, 0.99, 0.0]]))
    assert torch.equal(moved[0], images[0].flip(-1))
    assert torch.equal(moved[1, 0, :4, 2:], images[1, 0, 2:, :4])
    assert moved[1, 0, 4:].sum() == 0
    assert moved[1, 0, :, :2].sum() == 0
