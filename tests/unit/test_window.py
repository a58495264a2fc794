"""A window's collective, for a world of one: means, the next length, and the first step that is not finite."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from fnet_dist import ledger, window
from fnet_dist.group import Group
from fnet_dist.ledger import TrainLine, WindowLine
from fnet_dist.step import StepResult
from fnet_dist.stopping import REASONS
from fnet_dist.window import MAX_WINDOW_STEPS, Taken, agree_to_stop, close_window, window_lines

ALONE = Group(0, 1, torch.device("cpu"))


def taken(step, loss_sum=128.0, weight=64.0, gradient_sums=(1.0, 2.0), grad_norm=None):
    result = StepResult(
        loss_sum=torch.tensor(loss_sum),
        weight=weight,
        gradient_sums=[torch.tensor(value) for value in gradient_sums],
        grad_norm=None if grad_norm is None else torch.tensor(grad_norm),
        lr=0.003,
        samples=64,
    )
    return Taken(step, 64 * (step - 1), result, 1_790_000_000.0 + step)


def close(steps, seconds=0.5, stop="", save_due=False):
    return close_window(ALONE, 2, steps, time.perf_counter() - seconds, stop, save_due)


def test_losses_are_means_and_counters_go_on():
    closed = close([taken(11), taken(12, loss_sum=32.0, grad_norm=0.25)])
    assert [one.loss for one in closed.steps] == [2.0, 0.5]
    assert [one.loss_per_rank for one in closed.steps] == [(2.0,), (0.5,)]
    assert [one.samples for one in closed.steps] == [704, 768]
    assert [one.grad_norm for one in closed.steps] == [None, 0.25]
    assert (closed.epoch, closed.samples, closed.world_size, closed.stop, closed.failure) == (2, 128, 1, "", None)
    assert 0.5 <= closed.seconds < 60
    assert closed.samples_per_second == 128 / closed.seconds
    assert 0 < closed.max_memory_gib < 1000


def test_a_weight_may_be_a_tensor_beside_the_others():
    closed = close([taken(1, weight=torch.tensor(16.0)), taken(2, weight=torch.tensor(64.0, dtype=torch.float64))])
    assert [one.loss for one in closed.steps] == [8.0, 2.0]


@pytest.mark.parametrize("stop", REASONS)
def test_the_wish_to_stop_comes_through(stop):
    assert close([taken(1)], stop=stop).stop == stop
    assert agree_to_stop(ALONE, stop)[0] == stop


def test_a_checkpoint_falls_due_at_a_windows_end_but_not_where_a_step_was_bad():
    assert not close([taken(1)]).save
    assert close([taken(1)], save_due=True).save
    bad = close([taken(1), taken(2, loss_sum=math.nan)], save_due=True)
    assert (len(bad.steps), bad.save) == (1, False)


def test_where_there_are_no_steps_pieces_of_work_fill_the_next_window():
    """Evaluations too are left within half a second."""
    assert agree_to_stop(ALONE, "", done=10, seconds=0.25) == ("", 20)
    assert agree_to_stop(ALONE, "", done=10, seconds=5.0) == ("", 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_sum": math.nan}, "loss is nan at step 13 on rank 0; nothing was written from it"),
        ({"loss_sum": math.inf}, "loss is inf at step 13 on rank 0; "),
        ({"gradient_sums": [1.0, math.nan]}, "gradient is nan at step 13 on rank 0; nothing was written from it"),
        ({"gradient_sums": [-math.inf]}, "gradient is -inf at step 13 on rank 0; "),
        ({"gradient_sums": [math.inf, 1.0, -math.inf]}, "gradient is nan at step 13 on rank 0; "),
        ({"weight": 0.0, "loss_sum": 0.0}, "the loss's weights add up to 0 at step 13"),
    ],
    ids=str,
)
def test_the_first_step_that_is_not_finite_is_named_and_nothing_from_it_on_is_kept(wrong, message):
    closed = close([taken(11), taken(12), taken(13, **wrong), taken(14, loss_sum=math.nan)])
    assert closed.failure.startswith(message)
    assert "\n" not in closed.failure
    assert [one.step for one in closed.steps] == [11, 12]
    assert closed.samples == 128
    lines = window_lines(closed, attempt=1)
    assert lines[-1]["last_step"] == 12


def test_a_window_whose_first_step_is_not_finite_holds_no_step():
    closed = close([taken(1, loss_sum=math.nan)])
    assert (closed.steps, closed.samples) == ((), 0)
    assert "at step 1 on rank 0" in closed.failure


@pytest.mark.parametrize(
    ("steps", "seconds", "next_steps"),
    [
        (1, 0.0, 8),  # grows at most eightfold
        (100, 0.25, 200),  # about half a second of steps
        (40, 20.0, 1),
        (80, 20.0, 2),
        (1, 50.0, 1),  # never none
        (3000, 0.25, MAX_WINDOW_STEPS),
    ],
)
def test_the_next_window_is_about_half_a_second_long_within_bounds(steps, seconds, next_steps, monkeypatch):
    monkeypatch.setattr(window, "time", SimpleNamespace(perf_counter=lambda: 100.0))
    closed = close_window(ALONE, 2, [taken(step) for step in range(1, steps + 1)], 100.0 - seconds, "")
    assert (closed.next_steps, closed.seconds) == (next_steps, seconds)


def test_the_lines_have_the_keys_and_types_of_the_contract(tmp_path):
    closed = close([taken(11), taken(12, grad_norm=0.5)])
    lines = window_lines(closed, attempt=3)
    assert [[*line] for line in lines] == [[*TrainLine.__annotations__]] * 2 + [[*WindowLine.__annotations__]]
    assert lines[1] == {
        "kind": "train",
        "step": 12,
        "epoch": 2,
        "samples": 768,
        "loss": 2.0,
        "loss_per_rank": [2.0],
        "lr": 0.003,
        "grad_norm": 0.5,
        "time": 1_790_000_012.0,
        "attempt": 3,
    }
    last = lines[2]
    assert (last["first_step"], last["last_step"], last["world_size"], last["attempt"]) == (11, 12, 1, 3)
    assert last["step_ms"] == 1000 * closed.seconds / 2
    assert (last["slowest_rank"], last["max_over_median"]) == (None, None)
    ledger.append(tmp_path / "ledger", lines)
    assert list(ledger.read(tmp_path / "ledger")) == json.loads(json.dumps(lines))


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert window.peak_memory_gib(torch.device("cuda", 0)) == 3.0
