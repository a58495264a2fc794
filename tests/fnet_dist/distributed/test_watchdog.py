"""A rank that makes no progress reports it and ends; a rank that makes progress is not disturbed."""

import signal
import socket
import subprocess
import sys

import pytest

# In a process of its own, because the watchdog ends the whole process.
PROGRAM = """
import sys, threading, time
from fnet_dist.distributed.watchdog import Watchdog

def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.heartbeat("training, step", 41)
        time.sleep(0.02)

def wait_forever():
    threading.Event().wait(60)

def on_hang(message, exchange):
    print("on_hang:", message)
    print("torch" in sys.modules, flush=True)
    BROKEN

with Watchdog(3, 1.0, on_hang) as watchdog:
    HERE
print("closed", flush=True)
"""
HANGS = 'watchdog.restore_timeout(); watchdog.heartbeat("evaluating, sample", 640); wait_forever()'


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


def test_a_hang_ends_the_process_with_code_1_and_a_line_that_names_rank_and_place(hung):
    assert hung.returncode == 1
    assert "closed" not in hung.stdout
    assert hung.stderr.splitlines()[0] == (
        f"error: rank 3 on {socket.gethostname()} made no progress for 1 s (parallel.timeout_s is 1): "
        "evaluating, sample 640; the stacks of its threads follow"
    )


def test_the_stacks_show_where_it_waits(hung):
    assert "most recent call first" in hung.stderr
    assert "in wait_forever" in hung.stderr


def test_on_hang_gets_the_message_and_the_module_needs_no_torch(hung):
    message, torch_is_imported = hung.stdout.splitlines()
    assert message.startswith("on_hang: rank 3 on ")
    assert message.endswith("evaluating, sample 640")
    assert torch_is_imported == "False"


def test_an_error_in_on_hang_does_not_keep_the_process_alive():
    ended = run(HANGS, broken="raise OSError('disk full')")
    assert ended.returncode == 1
    assert "in wait_forever" in ended.stderr
    assert "Timeout (" not in ended.stderr, "it ends at once, not by the C thread's later alarm"


def test_progress_and_a_slow_start_do_not_end_the_process_and_closing_ends_the_watch():
    """Ten times the timeout holds before the first window; then one heartbeat within each timeout is enough."""
    ended = run("time.sleep(2); watchdog.heartbeat('training, step', 1); watchdog.restore_timeout(); work(2.5)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


def test_the_first_window_may_take_longer_than_the_timeout_and_its_end_counts_as_progress():
    ended = run(
        "watchdog.heartbeat('waiting for all ranks after step', 1); time.sleep(2)\n"
        "    watchdog.restore_timeout(); time.sleep(0.6)"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


SUSPENDED = """
    watchdog.restore_timeout()
    time.sleep(1)  # longer than a tick: the next one finds no heartbeat
    print("up", flush=True)
    spun = time.process_time() + 0.3
    while time.process_time() < spun:  # nor do those just after the suspension
        pass
    work(2)
"""


def test_time_in_which_the_process_was_suspended_is_no_hang():
    """As by PreemptMode=SUSPEND; far longer than the timeout of 3 s, and than that of the C thread."""
    program = PROGRAM.replace("Watchdog(3, 1.0", "Watchdog(3, 3.0").replace("HERE", SUSPENDED.strip())
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(10)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n")
