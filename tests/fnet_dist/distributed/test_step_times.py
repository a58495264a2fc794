"""StepTimer: where a step's time goes on one rank."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fnet_dist.distributed import step_times as module
from fnet_dist.distributed.step_times import StepTimer, step_times


@pytest.mark.parametrize("has_schedstat", [True, False])
def test_each_part_of_a_step_counts_for_what_it_is(has_schedstat, monkeypatch):
    """Two microbatches; a wait for buffers in the first; the last bucket's gradients are ready before the end."""
    if not has_schedstat:
        monkeypatch.setattr(module, "SCHEDSTAT", "/proc/no such file")
    timer = StepTimer(torch.device("cpu"))
    timer.start()
    for wait_s in (0.1, 0.0):
        timer.read()
        time.sleep(0.3)
        timer.compute()
        if wait_s:
            timer.exchange()
            time.sleep(wait_s)
            timer.compute()
        time.sleep(0.02)
        timer.gradients_ready()
    time.sleep(0.1)
    times = step_times(timer.end())
    assert 600 <= times.data < 680
    assert 40 <= times.compute < 90
    assert 200 <= times.exchange < 280
    timer.read()
    timer.gradients_ready()
    assert timer.end() == ()  # a step that is not timed, or an evaluation


def test_a_single_rank_computes_until_the_end():
    timer = StepTimer(torch.device("cpu"))
    timer.start()
    time.sleep(0.02)
    times = step_times(timer.end())
    assert times.compute >= 20
    assert times.data == times.exchange == 0


@pytest.mark.skipif(not Path(module.SCHEDSTAT).exists(), reason="this system has no schedstat")
def test_compute_time_excludes_the_time_in_which_other_processes_have_the_core():
    """With three processes on one core, 300 ms of work take 900 ms."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        timer, until = StepTimer(torch.device("cpu")), time.thread_time() + 0.3
        timer.start()
        began = time.perf_counter()
        while time.thread_time() < until:
            pass
        marks = timer.end()
        took = 1000 * (time.perf_counter() - began)
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()
    assert step_times(marks).compute == pytest.approx(300, abs=50)
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
    timer = StepTimer(torch.device("cuda", 0))
    timer.start()
    timer.read()
    timer.compute()
    timer.gradients_ready()
    timer.gradients_ready()
    assert step_times(timer.end()) == (10.0, 30.0, 10.0)  # ms, as CUDA gives them
