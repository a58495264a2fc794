"""Signals only set a flag; the second Ctrl-C ends at once."""

import signal
import subprocess
import sys

import pytest

from fnet_dist.stopping import REASONS, StopFlag, StoppedError

PROGRAM = """
import os, signal, sys
from fnet_dist.stopping import install_handlers

flag = install_handlers()
print(repr(flag.reason))
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    print(repr(flag.reason), flush=True)
print("torch" in sys.modules)
"""


def send(*names):
    return subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)


def test_each_signal_sets_its_flag_and_the_process_goes_on():
    ended = send("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT")
    assert ended.stdout.splitlines() == [
        "''",
        "'signal_usr1'",
        "'signal_usr2'",
        "'signal_term'",
        "'signal_int'",
        "False",
    ]
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_second_ctrl_c_ends_at_once():
    ended = send("SIGINT", "SIGINT")
    assert ended.stdout.splitlines() == ["''", "'signal_int'"]
    assert ended.stderr.endswith("KeyboardInterrupt\n")
    assert ended.returncode != 0


def test_a_flag_that_nobody_set_says_nothing_and_flags_do_not_share():
    one, other = StopFlag(), StopFlag()
    one.set(signal.SIGTERM, None)
    assert (one.reason, other.reason) == ("signal_term", "")


def test_every_reason_has_a_place_to_travel_as_and_none_is_zero():
    assert REASONS == ("", "signal_usr1", "signal_usr2", "signal_term", "signal_int")


@pytest.mark.parametrize(("reason", "exit_code"), [("signal_int", 130), ("signal_term", 1), ("signal_usr1", 1)])
def test_stopping_leaves_with_130_after_ctrl_c_else_with_1(reason, exit_code):
    stopped = StoppedError("stopped after step 7", reason)
    assert (stopped.reason, stopped.exit_code) == (reason, exit_code)
