"""The same global batches at any number of ranks, each sample once an epoch, from any position."""

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from fnet_dist.data.sampler import GlobalBatchSampler

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture
def repeat(request):
    """Return the command that repeats a failed random test."""
    return f'repeat: python -m pytest "{request.node.nodeid}"'


@dataclass(frozen=True)
class Case:
    samples: int
    global_batch_size: int
    seed: int
    microbatches: int
    epoch: int
    first_batch: int

    def sampler(self, rank=0, world_size=1, **other):
        values = {
            "seed": self.seed,
            "microbatches": self.microbatches,
            "global_batch_size": self.global_batch_size,
            **other,
        }
        sampler = GlobalBatchSampler(range(self.samples), rank=rank, world_size=world_size, **values)
        sampler.set_position(self.epoch)
        return sampler


def random_case(seed):
    rng = random.Random(seed)
    samples = rng.choice([rng.randint(1, 9), rng.randint(1, 300)])
    size = rng.choice([rng.randint(1, 5), rng.randint(1, 64), samples])
    steps = -(-samples // size)
    return Case(
        samples,
        size,
        rng.randrange(10_000),
        rng.randint(1, 4),
        rng.randint(1, 5),
        rng.choice([0, rng.randint(0, steps)]),
    )


def samples_of(step):
    """Return the samples of a rank's step without placeholders, in order."""
    return [index for microbatch in step.microbatches for index in microbatch.indices[: microbatch.samples].tolist()]


def interleaved(local_batches):
    """Return the global batch, assembled from the ranks' local batches."""
    batch = [None] * sum(map(len, local_batches))
    for rank, local_batch in enumerate(local_batches):
        batch[rank :: len(local_batches)] = local_batch
    return batch


@pytest.mark.parametrize("seed", range(60))
def test_global_batches_are_the_same_at_any_world_size_and_local_batches_are_even(seed, repeat):
    case = random_case(seed)
    single_rank = [samples_of(step) for step in case.sampler().steps()]
    order = case.sampler().permutation().tolist()
    size = case.global_batch_size
    assert single_rank == [order[start : start + size] for start in range(0, case.samples, size)], (case, repeat)
    assert sorted(order) == list(range(case.samples)), (case, repeat)
    for world_size in WORLD_SIZES:
        ranks = [list(case.sampler(rank, world_size).steps()) for rank in range(world_size)]
        for number, (steps, batch) in enumerate(zip(zip(*ranks, strict=True), single_rank, strict=True)):
            local_batches = [samples_of(step) for step in steps]
            where = f"{case}, W={world_size}, step {number}: {local_batches}; {repeat}"
            assert interleaved(local_batches) == batch, where
            assert max(map(len, local_batches)) - min(map(len, local_batches)) <= 1, where
            assert {step.global_samples for step in steps} == {len(batch)}, where


@pytest.mark.parametrize("seed", range(60, 90))
def test_every_rank_has_the_same_number_of_microbatches_and_an_empty_one_holds_a_placeholder(seed, repeat):
    case = random_case(seed)
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            sampler = case.sampler(rank, world_size)
            for step, batch in zip(sampler.steps(), case.sampler().steps(), strict=True):
                where = f"{case}, rank {rank} of {world_size}: {step}; {repeat}"
                assert len(step.microbatches) == case.microbatches, where
                lengths = [microbatch.samples for microbatch in step.microbatches]
                assert max(lengths) - min(lengths) <= 1, where
                assert max(len(microbatch.indices) for microbatch in step.microbatches) <= max(
                    1, sampler.micro_batch_size
                ), where
                for microbatch in step.microbatches:
                    assert microbatch.indices.dtype == torch.int64, where
                    assert len(microbatch.indices) == max(1, microbatch.samples), where
                    assert {*microbatch.indices.tolist()} <= {*samples_of(batch)}, where


@pytest.mark.parametrize("seed", range(90, 120))
def test_from_a_position_it_yields_the_rest_of_the_epoch_and_knows_its_length(seed, repeat):
    case = random_case(seed)
    for world_size in WORLD_SIZES:
        sampler = case.sampler(world_size - 1, world_size)
        whole = [samples_of(step) for step in sampler.steps()]
        sampler.set_position(case.epoch, case.first_batch)
        where = f"{case}, W={world_size}; {repeat}"
        assert [samples_of(step) for step in sampler.steps()] == whole[case.first_batch :], where
        assert list(sampler) == [index for step in whole[case.first_batch :] for index in step], where
        assert len(sampler) == len(list(sampler)), where
        assert sampler.steps_per_epoch == len(whole), where


@pytest.mark.parametrize("seed", range(120, 130))
def test_the_order_depends_on_epoch_and_seed_and_on_nothing_else(seed, repeat):
    orders = {
        (seed + other, epoch): tuple(Case(100, 8, seed + other, 1, epoch, 0).sampler().permutation().tolist())
        for other in range(3)
        for epoch in range(1, 4)
    }
    assert len({*orders.values()}) == len(orders), repeat
    again = Case(100, 64, seed, 3, 2, 0).sampler(rank=1, world_size=2).permutation()
    assert tuple(again.tolist()) == orders[seed, 2], repeat


def test_with_two_samples_left_the_third_rank_gets_a_placeholder():
    last = [[*Case(66, 64, 0, 1, 1, 0).sampler(rank, 3).steps()][-1] for rank in range(3)]
    assert [[microbatch.samples for microbatch in step.microbatches] for step in last] == [[1], [1], [0]]
    assert [step.global_samples for step in last] == [2, 2, 2]
    assert len(last[2].microbatches[0].indices) == 1


def test_with_three_samples_left_the_fourth_microbatch_is_a_placeholder():
    *_, last = Case(67, 64, 0, 4, 1, 0).sampler().steps()
    assert [microbatch.samples for microbatch in last.microbatches] == [1, 1, 1, 0]


def test_it_works_as_a_sampler_of_torchs_data_loader():
    samplers = [GlobalBatchSampler(range(50), global_batch_size=16, rank=rank, world_size=3) for rank in range(3)]
    assert all(isinstance(sampler, DistributedSampler) for sampler in samplers)
    loaders = [DataLoader(range(50), batch_size=4, sampler=sampler) for sampler in samplers]
    seen = [torch.cat(list(loader)).tolist() for loader in loaders]
    assert seen == [list(sampler) for sampler in samplers]
    assert sorted(index for rank in seen for index in rank) == list(range(50)), "torch's own would pad to 51"
    assert [len(sampler) for sampler in samplers] == [len(rank) for rank in seen]


def test_set_epoch_works_as_in_torch():
    ours = GlobalBatchSampler(range(50), global_batch_size=16, rank=1, world_size=2, seed=3)
    theirs = DistributedSampler(range(50), num_replicas=2, rank=1, seed=3)
    for sampler in (ours, theirs):
        orders = []
        for epoch in (0, 1, 2, 1):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert all(before != after for before, after in pairwise(orders))
        assert orders[1] == orders[3]
        assert list(sampler) == orders[3], "without set_epoch the order stays"


def test_without_shuffling_it_goes_through_the_data_in_order():
    sampler = Case(10, 4, 5, 1, 3, 0).sampler(rank=1, world_size=2, shuffle=False)
    assert [samples_of(step) for step in sampler.steps()] == [[1, 3], [5, 7], [9]]


def test_it_does_not_change_the_random_state_of_the_process():
    before = torch.get_rng_state()
    list(Case(100, 8, 0, 1, 1, 0).sampler().steps())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("case", "world_size", "text"),
    [
        (Case(60_000, 64, 0, 1, 1, 0), 1, "60,000 samples, 938 steps an epoch; global batch 64 = 1 rank x 64, on cpu"),
        (Case(60_000, 64, 0, 1, 1, 0), 2, "global batch 64 = 2 ranks x 32, on cpu"),
        (Case(60_000, 64, 0, 1, 1, 0), 3, "global batch 64 = 3 ranks x at most 22, on cpu"),
        (
            Case(60_000, 4096, 0, 4, 1, 0),
            2,
            "15 steps an epoch; global batch 4,096 = 2 ranks x 4 microbatches x 512, on cpu",
        ),
    ],
)
def test_one_line_describes_how_a_batch_is_split(case, world_size, text):
    line = case.sampler(world_size=world_size).describe("made-up data", "cpu")
    assert line.startswith("made-up data: 60,000 samples, ")
    assert line.endswith(text)


def test_indices_are_on_the_device_that_holds_the_samples():
    """Copied once an epoch, not once a step."""
    sampler = GlobalBatchSampler(range(10), global_batch_size=4, microbatches=2, device=torch.device("meta"))
    assert {part.indices.device.type for step in sampler.steps() for part in step.microbatches} == {"meta"}
