"""The two dataset classes return the requested samples in order, and leave no process behind."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch.utils.data import _utils

from fnet_dist.data.datasets import DatasetInfo, InMemoryDataset, StreamedDataset
from fnet_dist.errors import DataError

CPU = torch.device("cpu")


class NoSettings(BaseModel):
    pass


INFO = DatasetInfo("numbers", sha256="0" * 64, class_names=("even", "odd"), config=NoSettings())


class Numbers:
    """Sample i is [i, i, i] and its target i."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == 99:
            raise RuntimeError("sample 99 cannot be read")
        return torch.full((3,), float(index)), index


class WorkerPids(Numbers):
    """The target is the process that read the sample."""

    def __getitem__(self, index):
        return torch.zeros(3), os.getpid()


@pytest.fixture
def in_memory():
    inputs = torch.arange(100, dtype=torch.uint8)[:, None].expand(100, 3)
    return InMemoryDataset(inputs, torch.arange(100), CPU, INFO, transform=lambda images, key, indices: images.div(2.0))


@pytest.fixture
def streamed():
    return StreamedDataset(Numbers(), 2, CPU, INFO)


@pytest.fixture(autouse=True)
def no_worker_survives():
    yield
    assert multiprocessing.active_children() == []


def targets(batches):
    return [batch[1].tolist() for batch in batches]


def test_in_memory_samples_are_normalised_and_in_the_order_of_the_indices(in_memory):
    inputs, labels = in_memory.batch(torch.tensor([7, 3, 7]), 0)
    assert inputs.tolist() == [[3.5] * 3, [1.5] * 3, [3.5] * 3]
    assert inputs.dtype == torch.float32
    assert labels.tolist() == [7, 3, 7]
    assert len(in_memory) == 100
    assert targets(in_memory.batches(torch.arange(6).split(4), 0)) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_are_in_order_with_and_without_workers(num_workers):
    dataset = StreamedDataset(Numbers(), num_workers, CPU, INFO)
    order = torch.randperm(99, generator=torch.Generator().manual_seed(1)).split(8)
    for indices, (inputs, labels) in zip(order, dataset.batches(order, 0), strict=True):
        assert labels.tolist() == indices.tolist()
        assert inputs.tolist() == [[float(index)] * 3 for index in labels]
        assert torch.equal(inputs, dataset.batch(indices, 0)[0])
    assert len(dataset) == 100
    dataset.close()


def test_endless_indices_are_prefetched_in_part_and_closing_ends_the_workers(streamed):
    taken = itertools.count()
    batches = streamed.batches((torch.tensor([next(taken) % 99]) for _ in itertools.repeat(None)), 0)
    assert targets(itertools.islice(batches, 3)) == [[0], [1], [2]]
    workers = multiprocessing.active_children()
    batches.close()
    streamed.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert next(taken) <= 3 + 2 * 2  # two batches ahead for each of two workers


def test_the_same_workers_read_again_after_a_reading_that_ended_and_one_that_was_left(streamed):
    assert targets(streamed.batches(torch.arange(6).split(2), 0)) == [[0, 1], [2, 3], [4, 5]]
    workers = {worker.pid for worker in multiprocessing.active_children()}
    left = streamed.batches((torch.tensor([number % 99]) for number in itertools.count()), 0)
    assert targets(itertools.islice(left, 3)) == [[0], [1], [2]]
    left.close()
    assert targets(streamed.batches(torch.arange(50, 58).split(3), 1)) == [[50, 51, 52], [53, 54, 55], [56, 57]]
    assert {worker.pid for worker in multiprocessing.active_children()} == workers
    streamed.close()
    assert not multiprocessing.active_children()


def test_prefetching_does_not_change_the_random_state_of_the_process(streamed):
    before = torch.get_rng_state(), random.getstate()
    assert len(list(streamed.batches(torch.arange(20).split(4), 0))) == 5
    streamed.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_sample_is_one_line_that_names_it_and_its_place(num_workers):
    dataset = StreamedDataset(Numbers(), num_workers, CPU, INFO)
    place = r"numbers: sample 99: RuntimeError: sample 99 cannot be read \(\S*test_datasets\.py:\d+\)"
    with pytest.raises(DataError, match=f"^{place}$"):
        list(dataset.batches(torch.arange(90, 100).split(5), 0))
    dataset.close()


def test_an_error_in_a_whole_batch_is_one_line_that_names_its_samples():
    def transform(inputs, key, indices):
        raise ValueError("too dark")

    dataset = InMemoryDataset(torch.zeros(9), torch.zeros(9), CPU, INFO, transform=transform)
    with pytest.raises(DataError, match=r"^numbers: samples 0, 1, 2, 3 \.\.\.: ValueError: too dark \(\S+:\d+\)$"):
        next(dataset.batches(torch.arange(9).split(5), 0))


def test_inputs_and_targets_keep_their_nesting_types_and_shapes():
    inputs = {"a": torch.arange(6.0).view(3, 2), "b": (torch.tensor([True, False, True]), torch.arange(3))}
    targets = torch.rand(3, 4, dtype=torch.float64)
    found, labels = InMemoryDataset(inputs, targets, CPU, INFO).batch(torch.tensor([2, 0]), 0)
    assert torch.equal(labels, targets[[2, 0]])
    assert torch.equal(found["a"], inputs["a"][[2, 0]])
    assert [each.tolist() for each in found["b"]] == [[True, True], [2, 0]]
    with pytest.raises(DataError, match=r"inputs and targets of \[2, 3\] samples"):
        InMemoryDataset(torch.zeros(2), torch.zeros(3), CPU, INFO)


def test_signals_to_the_process_group_do_not_reach_the_workers():
    dataset = StreamedDataset(WorkerPids(), 2, CPU, INFO)
    batches = dataset.batches(torch.arange(60).split(1), 0)
    workers = {int(target) for _, target in itertools.islice(batches, 4)}
    # A child sends them: the parent's own SIGTERM is the one that counts.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    sends = [f"os.kill({worker}, {int(number)})" for worker in workers for number in numbers]
    subprocess.run([sys.executable, "-c", "import os; " + "; ".join(sends)], check=True)
    rest = {int(target) for _, target in batches}
    dataset.close()
    assert len(workers) == 2
    assert rest == workers


class StopsAtTwo(WorkerPids):
    """Its reader stands still within sample 2, as one does that waits for a disk; nowhere else: a process that is
    stopped while it holds one of torch's locks keeps its parent waiting too, until the hang guard ends both."""

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(index)


def test_a_stopped_worker_is_killed(monkeypatch):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # torch waits that long, twice
    dataset = StreamedDataset(StopsAtTwo(), 1, CPU, INFO)
    batches = dataset.batches(torch.arange(60).split(1), 0)
    stat = Path(f"/proc/{int(next(batches)[1])}/stat")
    deadline = time.monotonic() + 20
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    batches.close()
    dataset.close()
    assert multiprocessing.active_children() == []


def test_a_process_that_does_not_close_its_batches_exits_at_once():
    program = """
import sys, torch
from tests.fnet_dist.data.test_datasets import CPU, INFO, Numbers, StreamedDataset
batches = StreamedDataset(Numbers(), 2, CPU, INFO).batches(torch.arange(90).split(1), 0)
next(batches)
print("up", flush=True)
sys.exit(3)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        start = time.monotonic()
        assert process.wait(timeout=20) == 3
        assert time.monotonic() - start < 10
