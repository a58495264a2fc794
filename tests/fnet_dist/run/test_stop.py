"""Whoever asks to stop only sets a flag: signals, a deadline, a STOP file; the second Ctrl-C ends at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fnet_dist.run.run_dir import RunDir
from fnet_dist.run.stop import REASONS, SIGNALS, StopFlag, StoppedError, request_stop

PROGRAM = """
import os, signal, sys
from fnet_dist.run.stop import install_handlers

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


def test_signals_that_were_blocked_until_there_were_handlers_are_not_lost():
    """`jobs run` starts ranks with them blocked: one that comes while Python loads must not kill the rank."""
    program = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {[int(number) for number in SIGNALS]})
os.kill(os.getpid(), signal.SIGTERM)
from fnet_dist.run.stop import install_handlers
flag = install_handlers()
print(flag.reason)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "signal_term\n")


def test_a_deadline_that_has_passed_asks_to_stop_and_one_to_come_does_not():
    assert StopFlag(time.time() + 60).look() == ""
    assert StopFlag(time.time() - 0.01).look() == "deadline"
    assert StopFlag().look() == ""


def test_a_stop_file_asks_to_stop_as_soon_as_it_is_there(tmp_path):
    flag = StopFlag()
    flag.stop_file = tmp_path / "STOP"
    assert flag.look() == ""
    flag.stop_file.touch()
    assert flag.look() == flag.reason == "stop_file"


def test_a_stop_file_may_be_anything_and_still_asks(tmp_path):
    for make in (Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe")):
        flag = StopFlag()
        flag.stop_file = tmp_path / make.__name__.strip("<>")
        make(flag.stop_file)
        assert flag.look() == "stop_file"


def test_a_stop_file_may_say_who_asks(tmp_path):
    flag, run = StopFlag(), RunDir(tmp_path)
    flag.stop_file = run.stop
    request_stop(run, "wandb_stop")
    assert flag.look() == "wandb_stop"


def test_the_first_who_asked_is_named(tmp_path):
    flag = StopFlag(time.time() - 1)
    flag.stop_file = tmp_path / "STOP"
    flag.stop_file.touch()
    flag.set(signal.SIGUSR2, None)
    assert flag.look() == "signal_usr2"


def test_every_reason_has_a_place_to_travel_as_and_none_is_zero():
    """Of several the last one counts: what was lost is stronger than what was asked."""
    assert REASONS == (
        "",
        "signal_usr1",
        "signal_usr2",
        "signal_term",
        "signal_int",
        "deadline",
        "stop_file",
        "wandb_stop",
        "lost_ownership",
    )


@pytest.mark.parametrize(
    ("reason", "exit_code"), [("signal_int", 130), ("signal_term", 75), ("deadline", 75), ("stop_file", 75)]
)
def test_stopping_leaves_with_130_after_ctrl_c_else_with_75(reason, exit_code):
    stopped = StoppedError(1007, reason, RunDir(Path("runs/r")))
    assert (stopped.reason, stopped.exit_code) == (reason, exit_code)
    assert str(stopped) == f"stopped at step 1,007 as asked ({reason}), checkpointed"
