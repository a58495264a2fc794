"""A rank that makes no progress says so and ends; one that does is left alone."""

import socket
import subprocess
import sys

import pytest

# Without torch, in a process of its own: the guard ends the whole process.
PROGRAM = """
import sys, threading, time
from fnet_dist.distributed.watchdog import Watchdog

def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        guard.heartbeat("training, step", 41)
        time.sleep(0.02)

def wait_for_nobody():
    threading.Event().wait(60)

def on_hang(message):
    print("on_hang:", message)
    print("torch" in sys.modules, flush=True)
    BROKEN

with Watchdog(3, 1.0, on_hang) as guard:
    HERE
print("closed", flush=True)
"""
HANGS = 'guard.started(); guard.heartbeat("evaluating, sample", 640); wait_for_nobody()'


def run(here, broken="pass"):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("HERE", here).replace("BROKEN", broken)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def hung():
    return run(HANGS)


def test_a_hang_ends_the_process_with_code_1_and_one_line_that_names_rank_and_place(hung):
    assert hung.returncode == 1
    assert "closed" not in hung.stdout
    assert hung.stderr.splitlines()[0] == (
        f"error: rank 3 on {socket.gethostname()} made no progress for 1 s (parallel.timeout_s is 1): "
        "evaluating, sample 640; the stacks of its threads follow"
    )


def test_the_stacks_show_where_it_waits(hung):
    assert "most recent call first" in hung.stderr
    assert "in wait_for_nobody" in hung.stderr


def test_the_last_words_are_passed_on_and_need_no_torch(hung):
    said, torch_was_there = hung.stdout.splitlines()
    assert said.startswith("on_hang: rank 3 on ")
    assert said.endswith("evaluating, sample 640")
    assert torch_was_there == "False"


def test_last_words_that_fail_do_not_keep_it_alive():
    ended = run(HANGS, broken="raise OSError('disk full')")
    assert ended.returncode == 1
    assert "in wait_for_nobody" in ended.stderr
    assert "Timeout (" not in ended.stderr, "it ends at once, not by the C thread's later alarm"


def test_progress_and_a_slow_start_do_not_fire_and_closing_ends_the_watch():
    """Before the first window ten times the timeout holds; afterwards a beat within each timeout is enough."""
    ended = run("time.sleep(2); guard.heartbeat('training, step', 1); guard.started(); work(2.5)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


def test_the_first_window_may_take_longer_than_the_timeout_and_its_end_is_progress():
    ended = run(
        "guard.heartbeat('waiting for all ranks after step', 1); time.sleep(2); guard.started(); time.sleep(0.6)"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")
