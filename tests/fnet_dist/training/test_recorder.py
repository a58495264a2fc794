"""What rank 0 writes down: each step once, also on a full disk; nothing once the run is another's."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fnet_dist.checkpoint.state import TrainState
from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.config.schema import Config
from fnet_dist.errors import LostOwnershipError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt
from fnet_dist.run.run_dir import open_run, run_dir_of
from fnet_dist.run.stop import StopFlag
from fnet_dist.training.evaluation import Evaluation
from fnet_dist.training.recorder import open_recorder
from fnet_dist.training.window import StepRecord, Window

NONE = torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def parts(tmp_path):
    """Config, claimed attempt and a state whose counters the tests move."""
    config = Config.model_validate({"run": {"name": "r", "root": str(tmp_path)}, "tracking": {"wandb": "disabled"}})
    attempt = claim_attempt(run_dir_of(config))
    open_run(config)
    model = torch.nn.Linear(2, 2)
    return config, attempt, TrainState(model, torch.optim.SGD(model.parameters()))


def take(state: TrainState, last: int, save: bool = False) -> Window:
    """The window of the steps from the state's to `last`."""
    steps = tuple(
        StepRecord(step, 64 * step, 1 / step, (1 / step,), 0.1, None, 0.0) for step in range(state.step + 1, last + 1)
    )
    state.step = state.epoch_steps = last
    state.epoch_seconds += 1
    return Window(1, steps, 64 * len(steps), 1.0, 1, 0.1, 1, "", save, None)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def recorded(run) -> list[int]:
    return [line["step"] for line in metrics_log.read(run.metrics_log) if line["kind"] == "train"]


def wait_for_checkpoint(run, step: int) -> None:
    deadline = time.monotonic() + 10
    while checkpoint_steps(run)[:1] != [step]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_lines_wait_for_room_and_no_checkpoint_is_saved_before_they_are_written(parts, capsys):
    config, attempt, state = parts
    run = attempt.run
    with open_recorder(config, RunOutcomeWriter(attempt), state, 100, []) as record:
        record.window(take(state, 10), state, StopFlag())
        written = run.metrics_log.read_bytes()
        with full_disk(len(written) + 100):  # a part of a line has room
            record.window(take(state, 20, save=True), state, StopFlag())
            record.window(take(state, 30, save=True), state, StopFlag())
            assert run.metrics_log.read_bytes() == written
        assert checkpoint_steps(run) == []
        record.window(take(state, 40, save=True), state, StopFlag())
        assert recorded(run) == list(range(1, 41))
        wait_for_checkpoint(run, 40)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert [line.count("metrics.jsonl not written: No space left on device; ") for line in said] == [1, 1]
    assert "; 22 lines wait" in said[1]


def test_a_save_that_must_be_does_not_leave_lines_behind(parts):
    config, attempt, state = parts
    with open_recorder(config, RunOutcomeWriter(attempt), state, 100, []) as record:
        with full_disk(0):
            record.window(take(state, 10), state, StopFlag())
            with pytest.raises(OSError, match="File too large"):
                record.save_now(state)
        record.save_now(state)
    assert (recorded(attempt.run), checkpoint_steps(attempt.run)) == (list(range(1, 11)), [10])


def test_a_replay_writes_no_step_twice_and_no_epoch_twice(parts):
    config, attempt, state = parts
    for _ in range(2):
        state.step = state.epoch_steps = 0
        with open_recorder(config, RunOutcomeWriter(attempt), state, 100, []) as record:
            record.window(take(state, 10), state, StopFlag())
            record.epoch(state, Evaluation(0.5, 1, 1, NONE, NONE))
    with open_recorder(config, RunOutcomeWriter(attempt), state, 100, []) as record:
        state.step = 5
        record.window(take(state, 15), state, StopFlag())  # half of it is on record
    lines = [
        (line["kind"], line.get("step", line.get("last_step"))) for line in metrics_log.read(attempt.run.metrics_log)
    ]
    first = [("train", step) for step in range(1, 11)] + [("window", 10), ("epoch", 10)]
    assert lines == [*first, *(("train", step) for step in range(11, 16)), ("window", 15)]


def test_once_the_run_is_anothers_nothing_is_written_and_all_ranks_are_asked_to_leave(parts):
    config, attempt, state = parts
    with open_recorder(config, RunOutcomeWriter(attempt), state, 100, []) as record:
        record.window(take(state, 10), state, StopFlag())
        before = attempt.run.metrics_log.read_bytes()
        end_attempt(attempt, "crash", 0, 1)
        claim_attempt(attempt.run)
        stop = StopFlag()
        record.window(take(state, 20, save=True), state, stop)
        assert stop.look() == "lost_ownership"
        with pytest.raises(LostOwnershipError):
            record.epoch(state, Evaluation(0.5, 1, 1, NONE, NONE))
        with pytest.raises(LostOwnershipError):
            record.save_now(state)
    assert attempt.run.metrics_log.read_bytes() == before
    assert checkpoint_steps(attempt.run) == []
