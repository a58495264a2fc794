"""Rank 0's checkpoints: saved during training, one at a time; a full disk costs no other checkpoint."""

import resource
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim

from fnet_dist.checkpoint import saver
from fnet_dist.checkpoint.saver import Saver
from fnet_dist.checkpoint.state import TrainState
from fnet_dist.checkpoint.storage import checkpoint_steps, find_corruption, save_checkpoint
from fnet_dist.config.schema import CheckpointConfig
from fnet_dist.errors import LostOwnershipError, NonFiniteError, StorageError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.run_dir import RunDir
from tests.helpers.log_lines import log_lines


class Bench:
    """A saver with its run, the state it saves and the lines it logged."""

    def __init__(self, path, logged=(), **config):
        self.run = RunDir(path / "r")
        self.attempt = claim_attempt(self.run)
        metrics_log.append(self.run.metrics_log, [])
        model = nn.Linear(40, 3)
        self.state = TrainState(model, optim.SGD(model.parameters()))
        self.logged = logged
        self.saver = Saver(self.attempt, CheckpointConfig(**config), "abc", 100, 0)

    def save(self, step):
        self.state.step = step
        self.saver.save(self.state)

    def save_now(self, step):
        self.state.step = step
        self.saver.save_now(self.state)

    @property
    def steps(self):
        """The steps of the valid checkpoints."""
        return [
            step for step in checkpoint_steps(self.run) if find_corruption(self.run.checkpoint(step), "abc") is None
        ]


@pytest.fixture
def bench(tmp_path):
    with log_lines() as logged:
        made = Bench(tmp_path, logged)
        yield made
        made.saver.close()


@pytest.fixture
def held(monkeypatch):
    """Make a commit wait: it sets the event `begun`, and continues when `go` is set."""
    events = SimpleNamespace(begun=threading.Event(), go=threading.Event())

    def hold(*arguments):
        events.begun.set()
        assert events.go.wait(30)
        save_checkpoint(*arguments)

    monkeypatch.setattr(saver, "save_checkpoint", hold)
    yield events
    events.go.set()


@contextmanager
def full_disk(largest=100):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))  # beyond it, writing a file fails
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_training_continues_during_a_save_and_a_second_save_is_skipped(bench, held):
    bench.save(1)
    assert held.begun.wait(30)
    with torch.no_grad():
        bench.state.model.weight.zero_()
    bench.save(2)
    held.go.set()
    bench.saver.close()
    assert bench.steps == [1], "the one that fell due meanwhile is skipped, not queued"
    assert bench.logged == []


def test_the_next_save_runs_after_the_previous_one_ended(bench):
    for step in (1, 2, 3):
        bench.save(step)
        until(lambda step=step: bench.steps[:1] == [step])
        until(bench.saver._running.done)
    assert bench.steps == [3, 2], "and older ones are pruned"


def test_a_save_that_is_asked_for_during_another_one_is_due_after_it(bench, held):
    bench.save(1)
    assert held.begun.wait(30)
    bench.saver.is_asked = True
    assert not bench.saver.is_due(None)
    bench.save(2)  # which falls due by itself, and is skipped
    held.go.set()
    until(lambda: not bench.saver.is_running)
    assert bench.saver.is_due(None)
    bench.save(3)
    until(lambda: not bench.saver.is_running)
    assert not bench.saver.is_due(None)
    assert bench.steps == [3, 1]


def test_save_now_waits_for_the_running_save_too(bench, held):
    bench.save(1)
    assert held.begun.wait(30)
    threading.Timer(0.05, held.go.set).start()
    bench.save_now(2)
    assert bench.steps == [2, 1]


def test_a_saved_step_is_not_saved_again(bench, monkeypatch):
    bench.save_now(1)
    monkeypatch.setattr(saver, "save_checkpoint", pytest.fail)
    bench.save_now(1)


def test_the_metrics_log_is_on_disk_before_the_checkpoint(bench, monkeypatch):
    order = []
    monkeypatch.setattr(saver, "fsync", lambda path: order.append(path))
    monkeypatch.setattr(saver, "save_checkpoint", lambda *arguments: order.append("committed"))
    bench.save_now(1)
    assert order == [bench.run.metrics_log, "committed"]


# A disk that will not take it -----------------------------------------------------------------------------------------


def test_a_failed_save_warns_with_path_and_bytes_and_keeps_the_last_checkpoint(bench):
    bench.save_now(1)
    with full_disk():
        bench.save(2)
        until(bench.saver._running.done)
    (line,) = bench.logged
    assert line.startswith(f"WARNING: checkpoint not saved: {bench.run.checkpoint(2)}: File too large; needs ")
    assert line.endswith(" are free; the one of step 1 stays, and the next checkpoint that is due tries again")
    assert "\n" not in line
    assert [path.name for path in bench.run.checkpoints.iterdir()] == ["step_00000001"]
    bench.save(3)
    bench.saver.close()
    assert bench.steps == [3, 1]
    assert len(bench.logged) == 1


def test_a_failed_save_now_raises_and_names_the_last_checkpoint(bench):
    bench.save_now(1)
    with (
        full_disk(),
        pytest.raises(StorageError, match=r"step 2 could not be saved .* checkpoint is of step 1: make") as caught,
    ):
        bench.save_now(2)
    assert caught.value.exit_code == 74
    assert bench.logged[0].startswith("WARNING: checkpoint not saved: ")
    bench.save_now(2)
    assert bench.steps == [2, 1], "where there is room again"


def test_the_warning_shows_bytes_needed_and_bytes_free(bench, monkeypatch):
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_234_567))
    with full_disk():
        bench.save(1)
        bench.saver.close()
    needed = int(bench.logged[0].split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 1000 < needed < 10_000
    assert "1,234,567 are free" in bench.logged[0]


def test_a_failed_pruning_is_a_warning_and_the_new_checkpoint_counts(bench, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "step_00000001")

    monkeypatch.setattr(saver, "prune", refuse)
    bench.save_now(1)
    assert bench.logged == ["WARNING: old checkpoints could not be removed: step_00000001: Permission denied"]
    assert bench.steps == [1]


def test_weights_that_are_not_finite_keep_the_last_checkpoint(bench):
    bench.save_now(1)
    with torch.no_grad():
        bench.state.model.weight[0, 0] = float("nan")
    bench.save(2)
    until(bench.saver._running.done)
    with pytest.raises(NonFiniteError, match="weight is not finite after step 3"):
        bench.save_now(3)
    assert bench.steps == [1]


# Lost -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_committed_after_a_later_attempt_claimed_the_run(bench):
    for step in (1, 2):
        bench.save_now(step)
    bench.run.attempt(2).mkdir()
    bench.save(3)
    until(bench.saver._running.done)
    with pytest.raises(LostOwnershipError, match="attempt 2 has taken"):
        bench.save_now(4)
    assert sorted(path.name for path in bench.run.checkpoints.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_checkpoint_is_not_committed_if_the_run_is_lost_during_the_save(bench, held):
    bench.save(1)
    assert held.begun.wait(30)
    bench.run.attempt(2).mkdir()
    held.go.set()
    bench.saver.close()
    assert list(bench.run.checkpoints.iterdir()) == []


# When -----------------------------------------------------------------------------------------------------------------


def test_a_save_is_due_every_seconds_after_the_last_one_began(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: clock[-1], thread_time=time.thread_time))
    bench = Bench(tmp_path, every_seconds=30.0)

    def is_due_at(now):
        clock.append(now)
        return bench.saver.is_due(None)

    due = [is_due_at(now) for now in (1000.0, 1029.9, 1030.0, 1031.0)]
    bench.save(1)
    until(bench.saver._running.done)
    due += [is_due_at(now) for now in (1031.0, 1061.0)]
    bench.saver.close()
    assert due == [False, False, True, True, False, True]


def test_a_save_that_runs_is_not_due_again(tmp_path, held):
    bench = Bench(tmp_path, every_seconds=0.0001)
    bench.save(1)
    assert held.begun.wait(30)
    assert not bench.saver.is_due(1)
    held.go.set()
    until(bench.saver._running.done)
    assert bench.saver.is_due(None)
    bench.saver.close()


def test_a_save_is_due_at_the_end_of_an_epoch_as_long_as_saves_take_under_one_percent(tmp_path, monkeypatch):
    clock, cpu = [1000.0], iter((0.0, 0.25))
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: clock[-1], thread_time=lambda: next(cpu)))
    bench = Bench(tmp_path, every_epochs=2)

    def is_due_at(now, ended_epoch):
        clock.append(now)
        return bench.saver.is_due(ended_epoch)

    due = [is_due_at(1000.5, epoch) for epoch in (None, 1, 2)]
    bench.save(1)
    bench.saver.close()
    due += [is_due_at(now, 4) for now in (1025.4, 1025.5)]  # the save began at 1000.5 and took a quarter of a second
    assert due == [False, False, True, False, True]
    assert not Bench(tmp_path / "never", every_epochs=None).saver.is_due(1)
