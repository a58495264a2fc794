"""A run that trains answers `fnet ask`, and no bit of it changes.

The training data of rank 0 writes the requests while a batch is read, and windows are short: no test waits for a clock.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.distributed.process_group import Group
from fnet_dist.run import metrics_log
from fnet_dist.run.ask import Request, read_request, write_request
from fnet_dist.run.run_dir import RunDir, read_json
from fnet_dist.run.stop import StopFlag, StoppedError
from fnet_dist.training.setup import TrainTestData
from jobs.verification.compare_runs import run_differences
from tests.helpers.config import FashionConfig
from tests.helpers.faulty_data import Fault, RandomDataset
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train_in_group

STEPS_PER_EPOCH = 13
EPOCHS = 40  # of the two ranks
IDS = ("00000001", "00000002", "00000003")
OnBatch = Callable[[int], object]  # is called with the number of each training batch that rank 0 reads, from 1


class ObservedDataset(RandomDataset):
    """Random images that call `on_batch`."""

    def __init__(self, config: Any, on_batch: OnBatch) -> None:
        super().__init__(config, 200, Fault("none"))
        self.on_batch, self.batches_read = on_batch, 0

    def batch(self, indices: Tensor, key: int) -> tuple[Tensor, Tensor]:
        self.batches_read += 1
        self.on_batch(self.batches_read)
        return super().batch(indices, key)


def train(
    group: Group, folder: Path, name: str, epochs: int, on_batch: OnBatch, stop: StopFlag | None = None, **run: Any
) -> None:
    """Train; in windows of one step if there is one rank, else of a few."""
    config = FashionConfig.model_validate(
        {
            "run": {"root": str(folder), "name": name, "epochs": epochs, **run},
            "data": {"dataset": "synthetic", "global_batch_size": 16},
            "model": {"dropout": 0.25},
            "checkpoint": {"every_seconds": 1e5, "every_epochs": None},  # none is due before the end
            "tracking": {"wandb": "disabled"},
        }
    )
    data = ObservedDataset(config.data, on_batch if group.is_rank0 else lambda _: None)
    test = RandomDataset(config.data, 20, Fault("none"))
    window_s = 0 if group.world_size == 1 else 0.01
    with patch("fnet_dist.training.window.WINDOW_S", window_s), suppress(StoppedError):
        train_in_group(group, config, TrainTestData(data, test), stop)


def ask(run: RunDir, kind: Any, number: int = 0, **more: Any) -> None:
    write_request(run, Request(kind=kind, attempt=1, id=IDS[number], **more))


def answers_of(run: RunDir) -> dict[str, Any]:
    """The content of each answer, by kind."""
    return {path.parent.name.partition("-")[0]: read_json(path) for path in run.attempt(1).glob("*/answer.json")}


def profiled_steps(trace: Path) -> list[int]:
    """The steps whose events are in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert "aten::addmm" in names
    return sorted(int(name.partition("#")[2]) for name in names if name.startswith("ProfilerStep#"))


# Two ranks ------------------------------------------------------------------------------------------------------------


def train_twice(group: Group, folder: Path) -> None:
    """Train undisturbed, and asked for everything there is, each when the one before is answered."""
    run = RunDir(folder / "asked")
    requests = [("profile", {"steps": 5}), ("save", {}), ("stacks", {"ranks": (1,)})]

    def ask_next(batch: int) -> None:
        if batch > 2 and requests and not run.ask.exists():
            kind, more = requests.pop(0)
            ask(run, kind, 2 - len(requests), **more)

    train(group, folder, "undisturbed", EPOCHS, lambda _: None)
    train(group, folder, "asked", EPOCHS, ask_next)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(train_twice, 2, folder)
    return folder


@pytest.mark.processes
def test_a_run_that_was_asked_for_everything_has_the_bits_of_one_that_was_not(runs):
    assert run_differences(RunDir(runs / "undisturbed"), RunDir(runs / "asked")) == []
    assert {kind: answer["errors"] for kind, answer in answers_of(RunDir(runs / "asked")).items()} == {
        "profile": [],
        "save": [],
        "stacks": [],
    }
    assert not RunDir(runs / "asked").ask.exists()


@pytest.mark.processes
def test_a_profile_is_of_exactly_the_next_steps_on_each_rank(runs):
    run = RunDir(runs / "asked")
    folder = run.attempt(1) / f"profile-{IDS[0]}"
    first, last = answers_of(run)["profile"]["steps"]
    assert last - first == 4
    for rank in (0, 1):
        assert profiled_steps(folder / f"rank_{rank}.trace.json.gz") == [*range(first, last + 1)]
        table = (folder / f"rank_{rank}.operations.txt").read_text()
        assert "aten::addmm" in table
        assert sum(line.lstrip()[:1].isalpha() for line in table.splitlines()) <= 12  # ten, a header and a sum
    assert len([*folder.iterdir()]) == 5


@pytest.mark.processes
def test_steps_in_a_profile_are_not_timed_so_that_no_rank_seems_slow(runs):
    run = RunDir(runs / "asked")
    first, last = answers_of(run)["profile"]["steps"]
    windows = [line for line in metrics_log.read(run.metrics_log) if line["kind"] == "window"]
    untimed = [range(line["first_step"], line["last_step"] + 1) for line in windows if line["compute_ms"] is None]
    assert [step for steps in untimed for step in steps] == [*range(first, last + 1)]


@pytest.mark.processes
def test_a_checkpoint_is_saved_when_it_is_asked_for(runs):
    run = RunDir(runs / "asked")
    step = int(answers_of(run)["save"]["checkpoint"].rpartition("_")[2])
    assert answers_of(run)["profile"]["steps"][1] < step < EPOCHS * STEPS_PER_EPOCH
    assert checkpoint_steps(run) == [EPOCHS * STEPS_PER_EPOCH, step]  # no other was due before the end


@pytest.mark.processes
def test_stacks_are_those_of_the_ranks_that_were_named(runs):
    folder = RunDir(runs / "asked").attempt(1) / f"stacks-{IDS[2]}"
    assert sorted(path.name for path in folder.iterdir()) == ["answer.json", "rank_1.stacks.txt"]
    text = (folder / "rank_1.stacks.txt").read_text()
    assert text.startswith("rank 1, attempt 1, after step ")
    assert "\nthread watchdog:\n" in text
    main = text.partition("thread MainThread:\n")[2].partition("\n\n")[0]
    assert "in fit" in main


# One process ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The threads of this process, and what is set for the profiler, are as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop("KINETO_LOG_LEVEL", None)


@pytest.fixture
def alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """A function that trains tmp_path/r for three epochs in this process, and returns what it prints of files."""

    def train_alone(on_batch: OnBatch, stop: StopFlag | None = None, **run: Any) -> list[str]:
        train(Group(0, 1, torch.device("cpu")), tmp_path, "r", 3, on_batch, stop, **run)
        return [line for line in capfd.readouterr().out.splitlines() if str(tmp_path) in line]

    return train_alone


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """The run that `alone` trains."""
    return RunDir(tmp_path / "r")


def at(number: int, call: Callable[[], object]) -> OnBatch:
    return lambda batch: call() if batch == number else None


@pytest.mark.parametrize(
    ("run_settings", "steps", "expected"),
    [
        ({}, 10, (4, 13)),  # up to the epoch's last step
        ({}, 11, (14, 24)),  # one more does not fit before the evaluation, but after it
        ({}, 20, (14, 26)),  # more than any epoch has
        ({"evaluate_every_steps": 6}, 4, (7, 10)),
    ],
)
def test_a_profile_contains_no_evaluation(run_settings, steps, expected, alone, run):
    alone(at(3, lambda: ask(run, "profile", steps=steps)), **run_settings)
    assert answers_of(run) == {"profile": {"steps": [*expected], "checkpoint": None, "errors": []}}
    trace = run.attempt(1) / f"profile-{IDS[0]}" / "rank_0.trace.json.gz"
    assert profiled_steps(trace) == [*range(expected[0], expected[1] + 1)]


def test_a_stop_within_the_steps_of_a_profile_writes_the_trace_so_far(alone, run):
    stop = StopFlag()

    def on_batch(batch: int) -> None:
        if batch == 3:
            ask(run, "profile", steps=10)
        if batch == 6:
            stop.reason = "signal_usr1"

    alone(on_batch, stop)
    assert answers_of(run)["profile"]["steps"] == [4, 6]
    assert profiled_steps(run.attempt(1) / f"profile-{IDS[0]}" / "rank_0.trace.json.gz") == [4, 5, 6]


def asked_and_stopped(alone, run: RunDir, kind: str) -> list[str]:
    """Ask for `kind` and stop in the third batch; return what rank 0 says of the answer."""
    stop = StopFlag()

    def on_batch(batch: int) -> None:
        if batch == 3:
            ask(run, kind)
            stop.reason = "signal_usr1"

    return alone(on_batch, stop)


def test_the_checkpoint_of_a_stop_answers_too(alone, run):
    assert asked_and_stopped(alone, run, "save") == [f"`fnet ask save` is answered: {run.checkpoint(3)}"]


def test_a_request_that_an_ended_attempt_left_is_removed_by_the_next(alone, run):
    """Whoever asked was told that the attempt ended."""
    assert asked_and_stopped(alone, run, "stacks") == []
    assert run.ask.exists()
    assert alone(lambda _: None) == [f"WARNING: {run.ask} is not a request to attempt 2; removed"]
    assert not run.ask.exists()
    assert answers_of(run) == {}


def test_a_request_to_the_next_attempt_is_left_to_it(alone, run):
    """An owner that was suspended, and has been taken over, wakes up."""
    request = Request(kind="save", attempt=2, id=IDS[0])
    assert alone(at(3, lambda: write_request(run, request))) == []
    assert read_request(run) == request


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"kind": "format the disk"}', b"9" * (2 << 20)])
def test_a_file_that_is_no_request_is_removed(content, alone, run):
    lines = alone(at(3, lambda: run.ask.write_bytes(content)))
    assert lines == [f"WARNING: {run.ask} is not a request to attempt 1; removed"]
    assert not run.ask.exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_at_all_is_left_alone(make, alone, run):
    assert alone(at(3, lambda: make(run.ask))) == []


def test_a_part_that_cannot_be_written_is_told_in_the_answer_and_training_goes_on(alone, run):
    table = run.attempt(1) / f"profile-{IDS[0]}" / "rank_0.operations.txt"

    def on_batch(batch: int) -> None:
        if batch == 3:
            table.mkdir(parents=True)
            ask(run, "profile")

    error = f"rank 0: {table}: Is a directory"
    assert alone(on_batch) == [f"WARNING: `fnet ask profile`: {error}; training goes on"]
    assert answers_of(run)["profile"]["errors"] == [error]
    assert run.model.exists()


def test_a_profiler_that_fails_is_told_in_the_answer(alone, run, monkeypatch):
    def fail(_: object) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(torch.profiler.profile, "start", fail)
    alone(at(3, lambda: ask(run, "profile")))
    assert answers_of(run)["profile"]["errors"] == ["rank 0: RuntimeError: no counters"]
    assert run.model.exists()


def test_an_answer_that_cannot_be_written_is_a_warning(alone, run):
    folder = run.attempt(1) / f"stacks-{IDS[0]}"

    def on_batch(batch: int) -> None:
        if batch == 3:
            folder.touch()
            ask(run, "stacks", ranks=(7,))  # so that rank 0 has nothing to write but the answer

    assert alone(on_batch) == [f"WARNING: `fnet ask stacks`: {folder}: File exists; training goes on"]
    assert not run.ask.exists()
    assert run.model.exists()


def test_a_checkpoint_that_cannot_be_saved_is_told_in_the_answer(alone, run):

    def on_batch(batch: int) -> None:
        if batch == 3:
            run.checkpoints.touch()
            ask(run, "save")
        if run.checkpoints.is_file() and answers_of(run):
            run.checkpoints.unlink()  # for the end

    lines = alone(on_batch)
    assert answers_of(run)["save"] == {
        "steps": None,
        "checkpoint": None,
        "errors": ["not saved; a warning in the log of rank 0 says why"],
    }
    assert lines[0].startswith("WARNING: checkpoint not saved: ")
    assert run.model.exists()
