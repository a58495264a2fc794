"""Attempts: one claim wins, a running owner keeps its run, and a dead one loses it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from fnet_dist.errors import ConfigError, LostOwnershipError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import STALE_S, Attempt, claim_attempt, heartbeat_thread, last_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from fnet_dist.run.stop import StopRequested
from tests.helpers.made_run import train_line

HOLD = """
import sys
from pathlib import Path
from fnet_dist.run import attempt
from fnet_dist.run.run_dir import RunDir

attempt.HEARTBEAT_EVERY_S = 0.02
with attempt.heartbeat_thread(attempt.claim_attempt(RunDir(Path(sys.argv[1])))):
    print("owned", flush=True)
    sys.stdin.readline()
"""


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "r")


@pytest.fixture(scope="module")
def gone():
    """Return the pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def claim(run):
    return claim_attempt(run, launch_id="abc")


def refusal(run):
    with pytest.raises(ConfigError) as caught:
        claim(run)
    assert caught.value.exit_code == 2
    return str(caught.value)


def change_owner(attempt, **values):
    write_json(attempt.begin, {**read_json(attempt.begin), **values})


def test_the_first_claim_makes_the_directory_and_records_the_owner(run):
    attempt = claim_attempt(run, world_size=2, settings={"run": {"seed": 1}})
    assert attempt.number == 1
    assert attempt.begin == run.path / "attempts" / "0001" / "begin.json"
    begin = read_json(attempt.begin)
    assert [*begin] == [
        "host",
        "machine",
        "pid",
        "pid_started",
        "since",
        "time",
        "slurm_job_id",
        "slurm_restart_count",
        "address",
        "committed_step",
        "world_size",
        "settings",
    ]
    assert (begin["host"], begin["pid"]) == (socket.gethostname(), os.getpid())
    assert (begin["world_size"], begin["settings"]) == (2, {"run": {"seed": 1}})
    assert {path.name for path in attempt.begin.parent.iterdir()} == {"begin.json", "alive"}
    assert [path.name for path in run.attempts.iterdir()] == ["0001"]


def test_these_are_the_files_of_an_attempt(run):
    attempt = claim(run)
    names = [path.name for path in (attempt.begin, attempt.end, attempt.heartbeat, attempt.log(3), attempt.error(3))]
    assert names == ["begin.json", "end.json", "alive", "rank_3.log", "rank_3.error"]


# Ownership ------------------------------------------------------------------------------------------------------------


def test_a_claim_is_refused_with_host_and_pid_of_a_running_owner(run):
    attempt = claim(run)
    since = read_json(attempt.begin)["since"]
    with heartbeat_thread(attempt):
        text = refusal(run)
    assert f"is owned by attempt 1: pid {os.getpid()} on {socket.gethostname()}, since {since}; wait for it" in text
    assert f"`fnet stop {run.path}`, or use another --run.name" in text
    assert "\n" not in text
    assert last_attempt(run).number == 1


@pytest.mark.parametrize(
    "elsewhere", [{"host": "node7"}, {"machine": "another boot, or another space of pids"}], ids=str
)
def test_a_run_owned_on_another_machine_can_be_claimed_after_its_heartbeat_stops(run, gone, impatient, elsewhere):
    """Its process cannot be seen from here: the heartbeat file decides, by the watcher's own clock."""
    attempt = claim(run)
    change_owner(attempt, pid=gone, **elsewhere)
    began = time.monotonic()
    assert claim(run).number == 2
    assert time.monotonic() - began > 0.3


def test_a_claim_is_refused_while_the_heartbeat_of_another_host_changes(run, gone):
    attempt = claim(run)
    change_owner(attempt, host="node7", pid=gone)
    with heartbeat_thread(attempt):
        assert f"pid {gone} on node7" in refusal(run)


def test_a_temporarily_full_disk_does_not_make_a_running_owner_look_dead(run, monkeypatch):
    attempt, pwrite, failed = claim(run), os.pwrite, threading.Event()

    def full(*arguments):
        failed.set()
        raise OSError(28, "No space left on device")

    with heartbeat_thread(attempt):
        monkeypatch.setattr(os, "pwrite", full)
        assert failed.wait(10)
        monkeypatch.setattr(os, "pwrite", pwrite)
        assert "is owned by attempt 1" in refusal(run)


def test_a_claim_that_waits_can_be_stopped(run, gone):
    change_owner(claim(run), host="node7", pid=gone)
    with pytest.raises(StopRequested, match="signal_int"):
        claim_attempt(run, lambda: "signal_int")
    assert last_attempt(run).number == 1


def test_a_suspended_owner_loses_the_run_and_notices_when_it_continues(run, impatient):
    """After SIGSTOP its heartbeat does not change; after SIGCONT it must not commit anything."""
    attempt = claim(run)
    attempt.check()
    assert claim(run).number == 2
    assert attempt.is_superseded
    with pytest.raises(LostOwnershipError, match=r"attempt 2 has taken .* over; attempt 1 writes nothing more") as lost:
        attempt.check()
    assert lost.value.exit_code == 75


def test_the_next_number_can_be_claimed_at_once_after_an_attempt_ended(run):
    for number in (1, 2, 3):
        attempt = claim(run)
        assert attempt.number == number
        end_attempt(attempt, "crash", 0, 1)


def test_a_run_can_be_claimed_at_once_after_its_owner_was_killed(run):
    """After kill -9 there is no end.json, but its process is known to be gone: no wait for the heartbeat."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "owned\n"
        assert f"pid {process.pid} on" in refusal(run)
        process.kill()
    began = time.monotonic()
    assert claim(run).number == 2
    assert time.monotonic() - began < 5
    assert read_json(run.attempt(1) / "begin.json")["pid"] == process.pid, "what it wrote stays"


def test_an_owner_whose_pid_was_reused_counts_as_dead(run):
    change_owner(claim(run), pid_started="1")
    assert claim(run).number == 2


def test_attempts_are_sorted_by_number_not_as_text(run):
    for number in (9, 10, 10_000):
        run.attempt(number).mkdir(parents=True)
        write_json(run.attempt(number) / "begin.json", {})
        write_json(run.attempt(number) / "end.json", {})
    (run.attempts / "notes").mkdir()
    assert claim(run).number == 10_001


def test_exactly_one_of_many_concurrent_claims_wins(run):
    together, all_refused = threading.Barrier(8), threading.Event()
    won, refused = [], []

    def start():
        together.wait()
        try:
            attempt = claim(run)
        except ConfigError as error:
            refused.append(str(error))
            if len(refused) == 7:
                all_refused.set()
        else:
            won.append(attempt.number)
            with heartbeat_thread(attempt):
                all_refused.wait(20)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert len(refused) == 7
    assert all("another --run.name" in text for text in refused)
    assert [path.name for path in run.attempts.iterdir()] == ["0001"]


def test_a_claim_that_saw_no_attempt_loses_to_an_earlier_rename(run, monkeypatch):
    """The other start claimed between the look and the rename: the rename decides, and the error names the winner."""
    claim(run)
    looks = [None]
    monkeypatch.setattr("fnet_dist.run.attempt.last_attempt", lambda run: looks.pop() if looks else last_attempt(run))
    assert f"is owned by attempt 1: pid {os.getpid()} on" in refusal(run)
    assert [path.name for path in run.attempts.iterdir()] == ["0001"], "nothing of the loser is left"


def test_a_claim_that_waits_is_refused_when_another_start_claims_first(run, tmp_path):
    """Two starts wait for a suspended owner; the second finds the attempt that the first has claimed."""
    claim(run)
    refused = threading.Event()

    def claim_the_second() -> None:
        shutil.copytree(run.attempt(1), tmp_path / "second")
        (tmp_path / "second").rename(run.attempt(2))
        with heartbeat_thread(Attempt(run, 2)):
            refused.wait(20)

    quicker = threading.Timer(0.1, claim_the_second)
    quicker.start()
    assert "is owned by attempt 2" in refusal(run)
    refused.set()
    quicker.join()


@pytest.mark.parametrize("kept", [(), (1,), (1, 2)], ids=str)
def test_the_number_is_above_that_of_every_logged_line(run, kept):
    """People remove attempts/ as if it held logs. A lower number would make readers skip the new lines."""
    for number in (1, 2, 3):
        attempt = claim(run)
        metrics_log.append(run.metrics_log, [train_line(number, number)])
        end_attempt(attempt, "stop_file", number, 75)
    for number in {1, 2, 3} - {*kept}:
        shutil.rmtree(run.attempt(number))
    assert claim(run).number == 4


def test_an_owner_notices_a_later_one_across_a_gap(run):
    owner = claim(run)
    run.attempt(7).mkdir()
    with pytest.raises(LostOwnershipError):
        owner.check()


@pytest.mark.parametrize("left", ["nothing", "the directory"])
def test_an_owner_whose_files_are_removed_writes_them_again_and_stays_the_owner(run, left):
    attempt = claim(run)
    begin = read_json(attempt.begin)
    with heartbeat_thread(attempt):
        shutil.rmtree(run.attempts)
        if left == "the directory":
            attempt.path.mkdir(parents=True)
        while not attempt.heartbeat.exists():  # the test's time limit ends it
            pass
        assert read_json(attempt.begin) == begin
        assert "is owned by attempt 1: pid" in refusal(run)


def test_an_attempt_whose_files_were_purged_is_followed_at_once(run):
    for path in claim(run).path.iterdir():
        path.unlink()
    began = time.monotonic()
    assert claim(run).number == 2
    assert time.monotonic() - began < STALE_S / 3


def test_an_attempt_whose_begin_json_was_purged_is_followed_once_its_heartbeat_has_stopped(run, impatient):
    claim(run).begin.unlink()
    assert claim(run).number == 2


def test_the_heartbeat_thread_ends_if_the_directory_is_removed(run):
    with heartbeat_thread(claim(run)):
        shutil.rmtree(run.path)
