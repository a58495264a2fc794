"""A window's collective, for a world of one: means, the next length, and the first step that is not finite."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fnet_dist.distributed import stragglers as compute_time
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.skew import Straggler
from fnet_dist.distributed.stragglers import ComputeTimer, compute_ms
from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import TrainLine, WindowLine
from fnet_dist.run.stop import STOP_REASONS
from fnet_dist.training import window
from fnet_dist.training.recorder import window_lines
from fnet_dist.training.step import StepResult
from fnet_dist.training.window import MAX_WINDOW_STEPS, Taken, agree_to_stop, close_window, timing_stride

ALONE = Group(0, 1, torch.device("cpu"))


def taken(step, loss_sum=128.0, weight=64.0, gradient_sums=(1.0, 2.0), grad_norm=None, compute_time=()):
    result = StepResult(
        loss_sum=torch.tensor(loss_sum),
        weight=weight,
        gradient_sums=[torch.tensor(value) for value in gradient_sums],
        grad_norm=None if grad_norm is None else torch.tensor(grad_norm),
        lr=0.003,
        samples=64,
        compute_time=compute_time,
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


@pytest.mark.parametrize("stop", ["", *(row.name for row in STOP_REASONS)])
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
    lines = window_lines(closed, attempt=1, every_steps=50)
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
    lines = window_lines(closed, attempt=3, every_steps=50)
    assert [[*line] for line in lines] == [[*TrainLine.__annotations__]] * 2 + [[*WindowLine.__annotations__]]
    assert lines[1] == {
        "kind": "train",
        "step": 12,
        "epoch": 2,
        "samples": 768,
        "loss": 2.0,
        "loss_per_rank": [2.0],
        "loss_min": None,
        "loss_max": None,
        "worst_rank": None,
        "lr": 0.003,
        "grad_norm": 0.5,
        "time": 1_790_000_012.0,
        "attempt": 3,
    }
    last = lines[2]
    assert (last["first_step"], last["last_step"], last["world_size"], last["attempt"]) == (11, 12, 1, 3)
    assert last["step_ms"] == 1000 * closed.seconds / 2
    assert (last["slowest_rank"], last["max_over_median"]) == (None, None)
    metrics_log.append(tmp_path / "ledger", lines)
    assert list(metrics_log.read(tmp_path / "ledger")) == json.loads(json.dumps(lines))


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert window.peak_memory_gib(torch.device("cuda", 0)) == 3.0


def test_a_rank_sends_the_median_of_its_own_times_and_learns_those_of_all(monkeypatch):
    """Busy for 10, 11 and 900 ms, in one of the steps in two parts with a wait between them."""
    rank_1_adds = torch.zeros(6 + 3 * 4, dtype=torch.float64)
    rank_1_adds[4] = 20
    monkeypatch.setattr(window, "gather_rows", lambda group, row: torch.stack([row, row + rank_1_adds]))
    steps = [
        taken(1, compute_time=(0.0, 0.010)),
        taken(2, compute_time=(1.0, 1.004, 5.0, 5.007)),
        taken(3, compute_time=(6.0, 6.9)),
    ]
    closed = close_window(Group(0, 2, torch.device("cpu")), 2, steps, 0.0, "")
    assert closed.compute_ms == pytest.approx((11.0, 31.0))
    line = window_lines(closed, attempt=1, every_steps=50, skew=Straggler(1, 31 / 11))[-1]
    assert (line["slowest_rank"], line["max_over_median"]) == (1, 31 / 11)


def test_of_each_window_about_25_steps_are_timed_or_all_of_a_short_one():
    timed = {steps: steps // timing_stride(steps) for steps in range(1, MAX_WINDOW_STEPS + 1)}
    assert all(count == steps for steps, count in timed.items() if steps < 50)
    assert all(25 <= count < 50 for steps, count in timed.items() if steps >= 50)


def test_in_a_world_of_one_nothing_is_timed():
    assert close([taken(1)]).compute_ms == ()


@pytest.mark.parametrize("says_who_waits", [True, False])
def test_own_time_counts_sleep_until_the_last_gradients_are_ready_but_not_waiting_for_buffers(
    says_who_waits, monkeypatch
):
    if not says_who_waits:
        monkeypatch.setattr(compute_time, "SCHEDSTAT", "/proc/no such file")
    own, module = ComputeTimer(torch.device("cpu")), torch.nn.Linear(1, 1)
    own.start()
    time.sleep(0.02)
    own.turn(module, ())
    time.sleep(0.3)
    own.turn(module, ())
    own.ready()
    time.sleep(0.02)
    own.ready()
    assert 40 <= compute_ms(own.timestamps()) < 300
    own.turn(module, ())
    own.ready()
    assert own.timestamps() == ()  # a step that is not timed, or an evaluation


@pytest.mark.skipif(not Path(compute_time.SCHEDSTAT).exists(), reason="this system does not say who waits for a core")
def test_own_time_stands_still_while_others_have_the_core():
    """Three processes on one core: of 300 ms of work, this one's third takes 900."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        own, until = ComputeTimer(torch.device("cpu")), time.thread_time() + 0.3
        own.start()
        began = time.perf_counter()
        while time.thread_time() < until:
            pass
        own.ready()
        took = 1000 * (time.perf_counter() - began)
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()
    assert compute_ms(own.timestamps()) == pytest.approx(300, abs=50)
    assert took > 500


def test_on_a_gpu_the_device_notes_the_times_and_nobody_waits(monkeypatch):
    class Event:
        recorded = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.at = 10.0 * Event.recorded

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = ComputeTimer(torch.device("cuda", 0))
    own.start()
    own.ready()
    own.ready()
    assert compute_ms(own.timestamps()) == 20.0  # ms, as CUDA gives them
