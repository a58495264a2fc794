"""The collective of a window, on a single rank: mean losses, the next length, the first step that is not finite."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from fnet_dist.distributed.gpu_meter import GpuUsage
from fnet_dist.distributed.process_group import Group
from fnet_dist.distributed.stragglers import Straggler
from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import TrainLine, WindowLine
from fnet_dist.run.stop import STOP_REASONS
from fnet_dist.training import window
from fnet_dist.training.step import StepMetrics
from fnet_dist.training.window import MAX_WINDOW_STEPS, WindowStart, agree_to_stop, close_window, timing_stride
from fnet_dist.training.window_lines import spread, window_lines

SINGLE_RANK, TWO_RANKS = (Group(0, ranks, torch.device("cpu")) for ranks in (1, 2))


def measured(step, loss_sum=128.0, weight=64.0, gradient_sums=(1.0, 2.0), grad_norm=None, times=()):
    """The metrics of a step of 64 samples."""
    return StepMetrics(
        step=step,
        samples=64,
        loss_sum=torch.tensor(loss_sum),
        weight=weight,
        gradient_sums=[torch.tensor(value) for value in gradient_sums],
        grad_norm=None if grad_norm is None else torch.tensor(grad_norm),
        lr=0.003,
        times=times,
        time=1_790_000_000.0 + step,
    )


def close(steps, seconds=0.5, stop="", save_due=False):
    start = WindowStart(2, 64 * (steps[0].step - 1), time.perf_counter() - seconds)
    return close_window(SINGLE_RANK, start, steps, stop_reason=stop, save_due=save_due)


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
    assert closed.failure.message.startswith(message)
    assert "\n" not in closed.failure.message
    assert (closed.failure.step, closed.failure.rank) == (13, 0 if "rank 0" in message else None)
    assert [one.step for one in closed.steps] == [11, 12]
    assert closed.samples == 128
    lines = window_lines(closed, attempt=1)
    assert lines[-1]["last_step"] == 12


@pytest.mark.parametrize("steps", [[measured(1, loss_sum=math.nan)], [measured(1), measured(2, loss_sum=math.nan)]])
def test_a_stop_in_the_window_of_a_step_that_is_not_finite_does_not_hide_it(steps):
    """The stop would save the weights that the bad step has moved."""
    closed = close(steps, stop="signal_term", save_due=True)
    assert (closed.stop, closed.save) == ("", False)
    assert "loss is nan at step" in closed.failure.message


def test_a_window_whose_first_step_is_not_finite_contains_no_step():
    closed = close([measured(1, loss_sum=math.nan)])
    assert (closed.steps, closed.samples) == ((), 0)
    assert "at step 1 on rank 0" in closed.failure.message


def test_infinite_losses_of_opposite_signs_on_two_ranks_are_reported(monkeypatch):
    """math.fsum raises ValueError for inf - inf."""
    monkeypatch.setattr(
        window, "gather_rows", lambda group, row: torch.stack([row, torch.where(row.isinf(), -row, row)])
    )
    steps = [measured(1), measured(2, loss_sum=math.inf)]
    closed = close_window(TWO_RANKS, WindowStart(2, 0, 0.0), steps)
    assert closed.failure.message.startswith("loss is inf at step 2 on rank 0; ")
    assert closed.failure.rank is None, "no rank alone is the cause"
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
    closed = close_window(SINGLE_RANK, WindowStart(2, 0, 100.0 - seconds), [*map(measured, range(1, steps + 1))])
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
    assert last["data_ms"] is last["gpu_percent"] is None  # no step was timed, and there is no GPU
    metrics_log.append(tmp_path / "metrics.jsonl", lines)
    assert list(metrics_log.read(tmp_path / "metrics.jsonl")) == json.loads(json.dumps(lines))


def test_on_a_gpu_the_memory_is_what_torch_allocated_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert window.peak_memory_gib(torch.device("cuda", 0)) == 3.0


def test_a_rank_sends_where_its_time_goes_and_how_its_gpu_is_used_and_receives_that_of_all_ranks(monkeypatch):
    """It waits 1 ms for data, computes for 10, 11 and 900 ms, and waits 2 ms for rank 1, which has no GPU figures."""
    rank_1_adds = torch.zeros(7 + 7 + 3 * 4, dtype=torch.float64)
    rank_1_adds[6], rank_1_adds[8] = 20, 30
    rank_1_adds[10:14] = math.nan
    monkeypatch.setattr(window, "gather_rows", lambda group, row: torch.stack([row, row + rank_1_adds]))
    steps = [
        measured(step, times=((0, 0.0), (1, 0.001), (2, 0.001 + compute_s), (2, 0.003 + compute_s)))
        for step, compute_s in enumerate((0.010, 0.011, 0.9), start=1)
    ]
    gpu = GpuUsage(percent=97.0, memory_gib=3.5, watts=700.0, celsius=60.0)
    closed = close_window(TWO_RANKS, WindowStart(2, 0, 0.0), steps, gpu=gpu)
    assert closed.by_rank["busy_ms"].tolist() == pytest.approx([12.0, 32.0])
    line = window_lines(closed, attempt=1, straggler=Straggler(1, 32 / 12))[-1]
    assert (line["slowest_rank"], line["max_over_median"]) == (1, 32 / 12)
    mean = (10 + 11 + 900) / 3
    assert line["compute_ms"] == {"min": pytest.approx(mean), "median": pytest.approx(mean)} | {
        "max": pytest.approx(mean + 30),
        "max_rank": 1,
        "by_rank": pytest.approx([mean, mean + 30]),
    }
    assert line["data_ms"]["max"] == pytest.approx(1.0)
    assert line["exchange_ms"]["max"] == pytest.approx(2.0)
    assert line["gpu_percent"] == {"min": 97.0, "median": 97.0, "max": 97.0, "max_rank": 0, "by_rank": [97.0, None]}
    assert [line[f"gpu_{name}"]["max"] for name in ("memory_gib", "watts", "celsius")] == [3.5, 700.0, 60.0]


def test_above_eight_ranks_the_log_has_only_how_far_apart_they_are():
    assert spread(torch.arange(9.0)) == {"min": 0.0, "median": 4.0, "max": 8.0, "max_rank": 8, "by_rank": None}
    assert len(spread(torch.arange(8.0))["by_rank"]) == 8
    assert spread(torch.full((3,), math.nan)) is None


def test_about_25_steps_of_a_window_are_timed_or_all_of_a_short_one():
    timed = {steps: steps // timing_stride(steps) for steps in range(1, MAX_WINDOW_STEPS + 1)}
    assert all(count == steps for steps, count in timed.items() if steps < 50)
    assert all(25 <= count < 50 for steps, count in timed.items() if steps >= 50)
