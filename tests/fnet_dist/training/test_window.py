"""The collective of a window, on a single rank: mean losses, the next length, the first step that is not finite."""

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

from fnet_dist.distributed import stragglers
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.stragglers import ComputeTimer, Straggler, compute_ms
from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import TrainLine, WindowLine
from fnet_dist.run.stop import STOP_REASONS
from fnet_dist.training import window
from fnet_dist.training.recorder import window_lines
from fnet_dist.training.step import StepMetrics
from fnet_dist.training.window import MAX_WINDOW_STEPS, agree_to_stop, close_window, timing_stride

SINGLE_RANK = Group(0, 1, torch.device("cpu"))


def measured(step, loss_sum=128.0, weight=64.0, gradient_sums=(1.0, 2.0), grad_norm=None, compute_time=()):
    """The metrics of a step of 64 samples."""
    return StepMetrics(
        step=step,
        samples=64,
        loss_sum=torch.tensor(loss_sum),
        weight=weight,
        gradient_sums=[torch.tensor(value) for value in gradient_sums],
        grad_norm=None if grad_norm is None else torch.tensor(grad_norm),
        lr=0.003,
        compute_time=compute_time,
        time=1_790_000_000.0 + step,
    )


def close(steps, seconds=0.5, stop="", save_due=False):
    samples_before = 64 * (steps[0].step - 1)
    return close_window(SINGLE_RANK, 2, samples_before, steps, time.perf_counter() - seconds, stop, save_due)


def test_losses_are_means_and_samples_count_from_the_start_of_the_run():
    closed = close([measured(11), measured(12, loss_sum=32.0, grad_norm=0.25)])
    assert [one.loss for one in closed.steps] == [2.0, 0.5]
    assert [one.loss_per_rank for one in closed.steps] == [(2.0,), (0.5,)]
    assert [one.samples for one in closed.steps] == [704, 768]
    assert [one.grad_norm for one in closed.steps] == [None, 0.25]
    assert (closed.epoch, closed.samples, closed.world_size, closed.stop, closed.failure) == (2, 128, 1, "", None)
    assert 0.5 <= closed.seconds < 60
    assert closed.samples_per_second == 128 / closed.seconds
    assert 0 < closed.max_memory_gib < 1000


def test_weights_may_be_tensors_of_different_types():
    closed = close(
        [measured(1, weight=torch.tensor(16.0)), measured(2, weight=torch.tensor(64.0, dtype=torch.float64))]
    )
    assert [one.loss for one in closed.steps] == [8.0, 2.0]


@pytest.mark.parametrize("stop", ["", *(row.name for row in STOP_REASONS)])
def test_the_reason_to_stop_is_passed_on(stop):
    assert close([measured(1)], stop=stop).stop == stop
    assert agree_to_stop(SINGLE_RANK, stop)[0] == stop


def test_a_checkpoint_is_due_at_the_end_of_a_window_unless_a_step_was_not_finite():
    assert not close([measured(1)]).save
    assert close([measured(1)], save_due=True).save
    bad = close([measured(1), measured(2, loss_sum=math.nan)], save_due=True)
    assert (len(bad.steps), bad.save) == (1, False)


def test_batches_of_an_evaluation_fill_the_next_window():
    """An evaluation stops within half a second too."""
    assert agree_to_stop(SINGLE_RANK, "", done=10, seconds=0.25) == ("", 20)
    assert agree_to_stop(SINGLE_RANK, "", done=10, seconds=5.0) == ("", 1)


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
def test_the_first_step_that_is_not_finite_is_reported_and_nothing_is_kept_from_it_on(wrong, message):
    closed = close([measured(11), measured(12), measured(13, **wrong), measured(14, loss_sum=math.nan)])
    assert closed.failure.startswith(message)
    assert "\n" not in closed.failure
    assert [one.step for one in closed.steps] == [11, 12]
    assert closed.samples == 128
    lines = window_lines(closed, attempt=1)
    assert lines[-1]["last_step"] == 12


@pytest.mark.parametrize("steps", [[measured(1, loss_sum=math.nan)], [measured(1), measured(2, loss_sum=math.nan)]])
def test_a_stop_in_the_window_of_a_step_that_is_not_finite_does_not_hide_it(steps):
    """The stop would save the weights that the bad step has moved."""
    closed = close(steps, stop="signal_term", save_due=True)
    assert (closed.stop, closed.save) == ("", False)
    assert "loss is nan at step" in closed.failure


def test_a_window_whose_first_step_is_not_finite_contains_no_step():
    closed = close([measured(1, loss_sum=math.nan)])
    assert (closed.steps, closed.samples) == ((), 0)
    assert "at step 1 on rank 0" in closed.failure


def test_infinite_losses_of_opposite_signs_on_two_ranks_are_reported(monkeypatch):
    """math.fsum raises ValueError for inf - inf."""
    monkeypatch.setattr(
        window, "gather_rows", lambda group, row: torch.stack([row, torch.where(row.isinf(), -row, row)])
    )
    steps = [measured(1), measured(2, loss_sum=math.inf)]
    closed = close_window(Group(0, 2, torch.device("cpu")), 2, 0, steps, 0.0, "")
    assert closed.failure.startswith("loss is inf at step 2 on rank 0; ")
    assert [one.step for one in closed.steps] == [1]


@pytest.mark.parametrize(
    ("steps", "seconds", "next_steps"),
    [
        (1, 0.0, 8),  # grows at most eightfold
        (100, 0.25, 200),  # about half a second of steps
        (40, 20.0, 1),
        (80, 20.0, 2),
        (1, 50.0, 1),  # at least one step
        (3000, 0.25, MAX_WINDOW_STEPS),
    ],
)
def test_the_next_window_is_about_half_a_second_long_within_bounds(steps, seconds, next_steps, monkeypatch):
    monkeypatch.setattr(window, "time", SimpleNamespace(perf_counter=lambda: 100.0))
    closed = close_window(SINGLE_RANK, 2, 0, [measured(step) for step in range(1, steps + 1)], 100.0 - seconds, "")
    assert (closed.next_steps, closed.seconds) == (next_steps, seconds)


def test_lines_have_the_keys_and_types_of_the_metrics_log(tmp_path):
    closed = close([measured(11), measured(12, grad_norm=0.5)])
    lines = window_lines(closed, attempt=3)
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
    metrics_log.append(tmp_path / "metrics.jsonl", lines)
    assert list(metrics_log.read(tmp_path / "metrics.jsonl")) == json.loads(json.dumps(lines))


def test_on_a_gpu_the_memory_is_what_torch_allocated_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert window.peak_memory_gib(torch.device("cuda", 0)) == 3.0


def test_a_rank_sends_its_median_compute_time_and_receives_those_of_all_ranks(monkeypatch):
    """It computes for 10, 11 and 900 ms, in the second step with a wait in between."""
    rank_1_adds = torch.zeros(6 + 3 * 4, dtype=torch.float64)
    rank_1_adds[4] = 20
    monkeypatch.setattr(window, "gather_rows", lambda group, row: torch.stack([row, row + rank_1_adds]))
    steps = [
        measured(1, compute_time=(0.0, 0.010)),
        measured(2, compute_time=(1.0, 1.004, 5.0, 5.007)),
        measured(3, compute_time=(6.0, 6.9)),
    ]
    closed = close_window(Group(0, 2, torch.device("cpu")), 2, 0, steps, 0.0, "")
    assert closed.compute_ms == pytest.approx((11.0, 31.0))
    line = window_lines(closed, attempt=1, straggler=Straggler(1, 31 / 11))[-1]
    assert (line["slowest_rank"], line["max_over_median"]) == (1, 31 / 11)


def test_about_25_steps_of_a_window_are_timed_or_all_of_a_short_one():
    timed = {steps: steps // timing_stride(steps) for steps in range(1, MAX_WINDOW_STEPS + 1)}
    assert all(count == steps for steps, count in timed.items() if steps < 50)
    assert all(25 <= count < 50 for steps, count in timed.items() if steps >= 50)


def test_a_single_rank_has_no_compute_times():
    assert close([measured(1)]).compute_ms == ()


@pytest.mark.parametrize("has_schedstat", [True, False])
def test_compute_time_includes_sleep_until_the_last_gradients_are_ready_but_not_the_wait_for_buffers(
    has_schedstat, monkeypatch
):
    if not has_schedstat:
        monkeypatch.setattr(stragglers, "SCHEDSTAT", "/proc/no such file")
    timer = ComputeTimer(torch.device("cpu"))
    timer.start()
    time.sleep(0.02)
    timer.toggle_wait()
    time.sleep(0.3)
    timer.toggle_wait()
    timer.gradients_ready()
    time.sleep(0.02)
    timer.gradients_ready()
    assert 40 <= compute_ms(timer.timestamps()) < 300
    timer.toggle_wait()
    timer.gradients_ready()
    assert timer.timestamps() == ()  # a step that is not timed, or an evaluation


@pytest.mark.skipif(not Path(stragglers.SCHEDSTAT).exists(), reason="this system has no schedstat")
def test_compute_time_excludes_the_time_in_which_other_processes_have_the_core():
    """With three processes on one core, 300 ms of work take 900 ms."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        timer, until = ComputeTimer(torch.device("cpu")), time.thread_time() + 0.3
        timer.start()
        began = time.perf_counter()
        while time.thread_time() < until:
            pass
        timer.gradients_ready()
        took = 1000 * (time.perf_counter() - began)
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()
    assert compute_ms(timer.timestamps()) == pytest.approx(300, abs=50)
    assert took > 500


def test_on_a_gpu_the_device_records_the_times_without_a_synchronisation(monkeypatch):
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
    timer = ComputeTimer(torch.device("cuda", 0))
    timer.start()
    timer.gradients_ready()
    timer.gradients_ready()
    assert compute_ms(timer.timestamps()) == 20.0  # ms, as CUDA gives them
