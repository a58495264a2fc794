"""Signals, a deadline and a STOP file set a flag; a second Ctrl-C ends at once; one table holds all reasons."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fnet_dist import errors
from fnet_dist.errors import ConfigError
from fnet_dist.run.attempt import count_stalled_attempts
from fnet_dist.run.run_dir import RunDir, write_json
from fnet_dist.run.stop import (
    SIGNALS,
    STOP_REASONS,
    STOPPED_EXIT_CODES,
    StopFlag,
    StoppedError,
    decode_reason,
    encode_reason,
    is_final,
    reason_of_signal,
    request_stop,
    stop_reason,
)

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


def test_with_a_launcher_a_second_sigint_is_the_same_stop():
    """The launcher sends on what Slurm has sent to both; it kills its ranks at a second Ctrl-C."""
    flag = StopFlag(has_launcher=True)
    for _ in range(2):
        flag.set(signal.SIGINT, None)
    assert flag.reason == "signal_int"


def test_a_flag_is_empty_until_it_is_set_and_flags_are_independent():
    one, other = StopFlag(), StopFlag()
    one.set(signal.SIGTERM, None)
    assert (one.reason, other.reason) == ("signal_term", "")


def test_signals_that_arrive_before_the_handlers_are_not_lost():
    """`jobs run` starts ranks with signals blocked: one that arrives while Python loads must not kill the rank."""
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


def test_a_deadline_stops_the_run_once_it_has_passed():
    assert StopFlag(time.time() + 60).look() == ""
    assert StopFlag(time.time() - 0.01).look() == "deadline"
    assert StopFlag().look() == ""


def test_a_stop_file_stops_the_run_as_soon_as_it_exists(tmp_path):
    flag = StopFlag()
    flag.stop_file = tmp_path / "STOP"
    assert flag.look() == ""
    flag.stop_file.touch()
    assert flag.look() == flag.reason == "stop_file"


def test_a_stop_file_of_any_type_or_content_stops_the_run(tmp_path):
    for make in (Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe")):
        flag = StopFlag()
        flag.stop_file = tmp_path / make.__name__.strip("<>")
        make(flag.stop_file)
        assert flag.look() == "stop_file"


def test_a_stop_file_may_hold_the_reason(tmp_path):
    flag, run = StopFlag(), RunDir(tmp_path)
    flag.stop_file = run.stop
    request_stop(run, "wandb_stop")
    assert flag.look() == "wandb_stop"


def test_the_first_reason_is_kept(tmp_path):
    flag = StopFlag(time.time() - 1)
    flag.stop_file = tmp_path / "STOP"
    flag.stop_file.touch()
    flag.set(signal.SIGUSR2, None)
    assert flag.look() == "signal_usr2"


# The table of reasons -------------------------------------------------------------------------------------------------


# name: (status, exit code, signal, next in Slurm, final, number between ranks, stalled, stalled for a requeue)
TABLE = {
    "signal_usr1": ("stopped", 75, "SIGUSR1", "end", False, 1, 0, 0),
    "signal_usr2": ("stopped", 75, "SIGUSR2", "requeue", False, 2, 0, 1),
    "signal_term": ("stopped", 75, "SIGTERM", "wait", False, 3, 0, 0),
    "signal_int": ("stopped", 130, "SIGINT", "end", False, 4, 0, 0),
    "deadline": ("stopped", 75, None, "requeue", False, 5, 0, 1),
    "stop_file": ("stopped", 75, None, "end", False, 6, 0, 0),
    "wandb_stop": ("stopped", 75, None, "end", False, 7, 0, 0),
    "lost_ownership": ("failed", 75, None, "end", False, 8, 1, 1),
    "finished": ("finished", 0, None, "end", False, 9, 1, 1),
    "patience": ("finished", 0, None, "end", False, 10, 1, 1),
    "non_finite": ("failed", 1, None, "end", False, 11, 1, 1),
    "data": ("failed", 65, None, "end", True, 12, 1, 1),
    "checkpoint": ("failed", 65, None, "end", True, 13, 1, 1),
    "desync": ("failed", 1, None, "end", False, 14, 1, 1),
    "io": ("failed", 74, None, "end", False, 15, 1, 1),
    "hang": ("failed", 1, None, "end", False, 16, 1, 1),
    "bad_node": ("failed", 75, None, "requeue", False, 17, 1, 1),
    "no_progress": ("failed", 1, None, "end", False, 18, 1, 1),
    "crash": ("failed", 1, None, "end", False, 19, 1, 1),
}


def stalled(folder, name, *, count_requeues):
    """Return how many stalled attempts a run counts whose only attempt ended for the reason `name`."""
    run = RunDir(folder)
    run.attempt(1).mkdir(parents=True, exist_ok=True)
    write_json(run.attempt(1) / "begin.json", {"committed_step": 0})
    write_json(run.attempt(1) / "end.json", {"reason": name})
    return count_stalled_attempts(run, 0, count_requeues=count_requeues)


def test_each_reason_means_what_the_table_says(tmp_path):
    found = {
        row.name: (
            row.status,
            row.exit_code,
            row.signal and row.signal.name,
            row.slurm,
            row.final,
            encode_reason(row.name),
            stalled(tmp_path, row.name, count_requeues=False),
            stalled(tmp_path, row.name, count_requeues=True),
        )
        for row in STOP_REASONS
    }
    assert found == TABLE
    assert [*found] == [*TABLE], "the order is what travels between ranks"


def test_reasons_travel_as_numbers_and_no_reason_is_zero():
    """Of several reasons the highest number counts: a lost run is stronger than any request."""
    assert encode_reason("") == 0
    assert decode_reason(0) == ""
    assert [decode_reason(encode_reason(name)) for name in TABLE] == [*TABLE]
    assert max(map(encode_reason, ("wandb_stop", "lost_ownership", "signal_usr1"))) == encode_reason("lost_ownership")


def test_signals_and_exit_codes_follow_from_the_table():
    assert SIGNALS == (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    assert {reason_of_signal(number).name for number in SIGNALS} == {name for name in TABLE if TABLE[name][2]}
    assert {75, 130} == STOPPED_EXIT_CODES


def test_a_reason_of_another_version_counts_as_a_crash():
    assert stop_reason("solar_flare").name == "crash"


def test_every_error_has_a_reason_and_the_exit_code_of_that_reason():
    """Except a ConfigError: nothing was written, so it needs no reason of its own."""
    of_a_run = [error for name, error in vars(errors).items() if name.endswith("Error") and error is not ConfigError]
    assert len(of_a_run) == 9
    for error in of_a_run:
        assert (stop_reason(error.reason).name, stop_reason(error.reason).exit_code) == (error.reason, error.exit_code)


@pytest.mark.parametrize(
    ("reason", "exit_code", "final"),
    [
        ("checkpoint", 65, True),
        ("non_finite", 1, False),
        ("crash", 2, True),
        ("crash", 65, True),
        ("crash", 1, False),
        ("io", 74, False),
    ],
)
def test_a_failure_is_final_by_its_reason_or_by_its_exit_code(reason, exit_code, final):
    """A bad setting has the reason `crash`, and a rank that wrote no error file has only an exit code."""
    assert is_final(reason, exit_code) == final


@pytest.mark.parametrize(
    ("reason", "exit_code"), [("signal_int", 130), ("signal_term", 75), ("deadline", 75), ("stop_file", 75)]
)
def test_a_stop_exits_with_130_after_ctrl_c_and_with_75_otherwise(reason, exit_code):
    stopped = StoppedError(1007, reason, RunDir(Path("runs/r")))
    assert (stopped.reason, stopped.exit_code) == (reason, exit_code)
    assert str(stopped) == f"stopped at step 1,007 as asked ({reason}), checkpointed"
