"""Which rank failed first, and whether another attempt may help."""

import re
from random import Random
from types import SimpleNamespace

import pytest

from fnet_dist.checkpoint.storage import save_checkpoint
from fnet_dist.config.schema import ParallelConfig
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.run.attempt import Attempt, claim_attempt, last_attempt
from fnet_dist.run.failure import RankFailure
from fnet_dist.run.outcome import RunOutcomeWriter, end_attempt
from fnet_dist.run.run_dir import RunDir, write_json
from jobs.launcher.restart_policy import decide_restart, find_first_failure
from jobs.launcher.workers import Worker, Workers
from tests.helpers.checkpoint_faults import make_content

LOST = "lost the connection to another rank, which ended first"


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "r")


def begin(run, committed_step=0):
    return claim_attempt(run, launch_id=None, committed_step=lambda: committed_step)


@pytest.fixture
def attempt(run):
    return begin(run)


def ended(*codes, by_us=()):
    return [Worker(rank, SimpleNamespace(returncode=code), rank in by_us) for rank, code in enumerate(codes)]


def say(attempt, rank, message, reason="crash", *, aftermath=False, step=None, second=None):
    """Write the error file of a rank that fails at `second`."""
    file = attempt.error(rank)
    write_error_file(LaunchEnv(error_file=file), message, "", reason, aftermath=aftermath, step=step)
    if second is not None:
        file.write_text(re.sub(r'"timestamp": "\d+"', f'"timestamp": "{second}"', file.read_text()))


# The rank that failed first -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(0, 0), (75, 75), (130, 130), (0, 75)])
def test_ranks_that_ended_as_asked_have_not_failed(attempt, codes):
    say(attempt, 1, "stopped at step 7 as asked (signal_term), checkpointed", "signal_term")
    assert find_first_failure(attempt, ended(*codes)) is None


def test_a_killed_rank_comes_before_the_connections_that_broke(attempt):
    for rank in (0, 1, 3):
        say(attempt, rank, f"rank {rank} {LOST}", aftermath=True, second=100)
    cause = find_first_failure(attempt, ended(1, 1, -9, 1))
    assert cause == RankFailure(2, "crash", 1, "was killed by SIGKILL (by the kernel, for memory? see dmesg)")


def test_a_killed_rank_comes_before_an_error_that_its_loss_caused(attempt):
    """Not every broken connection is known by its words."""
    say(attempt, 0, "RuntimeError: something about gloo", second=100)
    assert find_first_failure(attempt, ended(1, -11)).message == "was killed by SIGSEGV"


# Printed by NCCL's watchdog before it aborts a rank, from public reports of torch 2.7.
NCCL_ABORT = """\
[rank1]:[E415 21:17:08.996319560 ProcessGroupNCCL.cpp:552] [Rank 1] Collective WorkNCCL(SeqNum=335, OpType=ALLREDUCE, \
NumelIn=1, NumelOut=1, Timeout(ms)=600000) raised the following async exception: NCCL error: remote process exited or \
there was a network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer node7<32926>
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x754ee7c6c1b6 in libc10.so)
terminate called after throwing an instance of 'c10::DistBackendError'
"""
GLOO_LOST = f"rank 0 {LOST}"


@pytest.mark.parametrize(
    ("codes", "logs", "said", "rank", "words"),
    [
        # NCCL: rank 2 has raised, the watchdogs of the others abort them.
        ((-6, -6, 1), {0: NCCL_ABORT, 1: NCCL_ABORT}, {2: ("ValueError: bug", False)}, 2, "ValueError: bug"),
        # NCCL: rank 1 ran out of memory.
        ((-6, -9, -6), {0: NCCL_ABORT, 2: NCCL_ABORT}, {}, 1, "was killed by SIGKILL "),
        # NCCL: rank 1 got the error in Python, before its watchdog; rank 2 crashed by itself.
        ((-6, 1, -6), {0: NCCL_ABORT, 2: "free(): invalid pointer"}, {1: (LOST, True)}, 2, "was killed by SIGABRT"),
        # NCCL: a node was cut off; nobody knows more.
        (
            (-6, -6),
            {0: NCCL_ABORT, 1: NCCL_ABORT},
            {},
            0,
            "was killed by SIGABRT, as it lost the connection to another",
        ),
        # gloo: peers see a closed connection, and explain it.
        ((1, 1, 1), {}, {0: (GLOO_LOST, True), 1: (GLOO_LOST, True), 2: ("ValueError: bug", False)}, 2, "ValueError: "),
        ((1, -6, 1), {1: "terminate called"}, {0: (GLOO_LOST, True), 2: (GLOO_LOST, True)}, 1, "was killed by SIGABRT"),
    ],
)
def test_recorded_endings_of_nccl_and_gloo_name_the_rank_that_explained_itself(attempt, codes, logs, said, rank, words):
    for each, text in logs.items():
        attempt.log(each).write_text(text)
    for each, (message, aftermath) in said.items():
        say(attempt, each, message, aftermath=aftermath, second=100)
    cause = find_first_failure(attempt, ended(*codes))
    assert cause.rank == rank
    assert cause.message.startswith(words)


def test_ranks_that_we_ended_are_never_named(attempt):
    say(attempt, 1, "ValueError: bug")
    assert find_first_failure(attempt, ended(-9, 1, -9, by_us=(0, 2))) == RankFailure(1, "crash", 1, "ValueError: bug")
    assert find_first_failure(attempt, ended(-9, 0, by_us=(0,))) is None


def test_an_error_comes_before_its_aftermath_even_if_it_is_dated_later(attempt):
    say(attempt, 0, f"rank 0 {LOST}", aftermath=True, second=100)
    say(attempt, 1, "ValueError: bug", second=101)
    assert find_first_failure(attempt, ended(1, 1)).rank == 1


def test_of_two_errors_the_earlier_is_named(attempt):
    say(attempt, 0, "io error on rank 0", "io", second=101)
    say(attempt, 1, "loss is nan", "non_finite", second=100)
    assert find_first_failure(attempt, ended(74, 1)) == RankFailure(1, "non_finite", 1, "loss is nan")


def test_if_all_ranks_lost_their_connection_one_of_them_is_named(attempt):
    say(attempt, 1, f"rank 1 {LOST}", aftermath=True)
    assert find_first_failure(attempt, ended(75, 1)) == RankFailure(1, "crash", 1, f"rank 1 {LOST}")


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_rank_without_an_error_file_is_named_with_its_exit_code(attempt, text):
    if text is not None:
        attempt.error(1).write_text(text)
    assert find_first_failure(attempt, ended(0, 137)) == RankFailure(
        1, "crash", 1, "ended with exit code 137 and without an error message"
    )
    assert find_first_failure(attempt, ended(0, 2)) == RankFailure(
        1, "crash", 2, "ended with exit code 2 and without an error message"
    )


# Whether another attempt may help -------------------------------------------------------------------------------------


def crash(reason="crash", exit_code=1):
    return RankFailure(1, reason, exit_code, "ValueError: bug")


def write_outcome(run, status, reason, exit_code, step=7):
    rest = {"epoch": 1, "metrics": None, "launch_id": None}
    write_json(run.outcome, {"status": status, "reason": reason, "step": step, "exit_code": exit_code, **rest})


def save(run, step):
    save_checkpoint(run, make_content(step, Random(step)), 1, lambda: None)


def parallel(max_restarts, *, replay_on_failure=True):
    return ParallelConfig(max_restarts=max_restarts, replay_on_failure=replay_on_failure)


def told(decision):
    return decision.status, decision.reason, decision.exit_code, decision.restarts


def test_a_crash_is_restarted_from_the_newest_checkpoint(run, attempt):
    save(run, 5)
    decision = decide_restart(attempt, crash(), Workers(), parallel(3))
    assert told(decision) == ("failed", "crash", 1, True)
    assert (decision.step, decision.message) == (5, "")


def test_a_failure_of_unknown_cause_is_restarted(attempt):
    assert told(decide_restart(attempt, None, Workers(), parallel(3))) == ("failed", "crash", 1, True)


@pytest.mark.parametrize(
    ("status", "reason", "exit_code"),
    [("finished", "finished", 0), ("stopped", "signal_term", 75), ("stopped", "stop_file", 75)],
)
def test_a_run_that_rank_0_finished_or_stopped_is_not_restarted_even_if_another_rank_failed(
    run, attempt, status, reason, exit_code
):
    write_outcome(run, status, reason, exit_code)
    decision = decide_restart(attempt, crash(), Workers(stop_signal="SIGINT"), parallel(3))
    assert (*told(decision), decision.step) == (status, reason, exit_code, False, 7)


@pytest.mark.parametrize(
    ("reason", "exit_code"),
    [("data", 65), ("checkpoint", 65), ("crash", 2), ("crash", 65)],
)
def test_a_failure_that_the_same_steps_would_repeat_is_not_restarted(run, attempt, reason, exit_code):
    assert told(decide_restart(attempt, crash(reason, exit_code), Workers(), parallel(3))) == (
        "failed",
        reason,
        exit_code,
        False,
    )
    assert told(decide_restart(attempt, crash(reason, exit_code), Workers(stop_signal="SIGTERM"), parallel(3))) == (
        "failed",
        reason,
        exit_code,
        False,
    )
    write_outcome(run, "failed", reason, exit_code)
    assert told(decide_restart(attempt, None, Workers(), parallel(3))) == ("failed", reason, exit_code, False)


@pytest.mark.parametrize(("reason", "exit_code"), [("io", 74), ("hang", 1)])
def test_full_disks_and_hangs_are_restarted(attempt, reason, exit_code):
    assert told(decide_restart(attempt, crash(reason, exit_code), Workers(), parallel(3))) == (
        "failed",
        reason,
        exit_code,
        True,
    )


def test_the_reason_of_the_rank_that_failed_first_counts_more_than_rank_0s(run, attempt):
    write_outcome(run, "failed", "crash", 1)
    assert told(decide_restart(attempt, crash("data", 65), Workers(), parallel(3))) == ("failed", "data", 65, False)


@pytest.mark.parametrize(
    ("signal", "reason", "exit_code"), [("SIGTERM", "signal_term", 75), ("SIGINT", "signal_int", 130)]
)
def test_a_failure_after_a_stop_was_asked_for_is_not_restarted(run, attempt, signal, reason, exit_code):
    save(run, 5)
    decision = decide_restart(attempt, crash(), Workers(stop_signal=signal), parallel(3))
    assert told(decision) == ("stopped", reason, exit_code, False)
    assert decision.message == f"not restarted, as {signal} asked for a stop; the last checkpoint is of step 5"


# Without progress -----------------------------------------------------------------------------------------------------


def attempts(run, *ends):
    """Attempts that end one after the other, each (committed step at its begin, reason); judged after the last."""
    for committed_step, reason in ends:
        attempt = begin(run, committed_step)
        end_attempt(attempt, reason, committed_step, 1)
    return last_attempt(run)


@pytest.mark.parametrize(
    ("ends", "newest", "restarts"),
    [
        ([(0, "crash")], 0, True),
        ([(0, "crash")] * 2, 0, True),
        ([(0, "crash")] * 3, 0, False),
        ([(0, "crash")] * 3, 5, True),
        ([(0, "crash")] * 3 + [(5, "crash")] * 2, 5, True),
        ([(0, "crash")] * 3 + [(5, "crash")] * 3, 5, False),
        ([(0, "crash"), (0, "hang"), (0, "io")], 0, False),
        ([(5, "crash"), (5, "signal_term"), (5, "deadline"), (5, "crash")], 5, True),
        ([(5, "crash"), (5, "signal_term"), (5, "crash"), (5, "crash")], 5, False),
    ],
    ids=str,
)
def test_three_attempts_in_a_row_without_a_new_checkpoint_are_enough(run, ends, newest, restarts):
    last = attempts(run, *ends)
    if newest:
        save(run, newest)
    decision = decide_restart(last, crash("io", 74), Workers(), parallel(3))
    assert decision.restarts == restarts
    assert told(decision)[:3] == ("failed", "io" if restarts else "no_progress", 74)
    if not restarts:
        assert decision.message == (
            "3 attempts in a row without a new checkpoint, given up (parallel.max_restarts is 3); "
            f"the logs are in {run.logs}"
        )


BUG = {"message": "ValueError: bug", "step": 12}


@pytest.mark.parametrize(
    ("before", "now", "killed", "restarts"),
    [
        (BUG, BUG, False, False),
        (BUG, BUG, True, True),  # a rank that was killed failed first
        (BUG, BUG | {"step": 13}, False, True),
        (BUG, BUG | {"message": "ValueError: another"}, False, True),
        (BUG | {"step": None}, BUG | {"step": None}, False, True),  # a start: perhaps the network
        (BUG | {"reason": "non_finite"}, BUG | {"reason": "non_finite"}, False, False),
        (BUG | {"reason": "non_finite"}, BUG | {"reason": "non_finite", "message": "loss is inf"}, False, False),
        (BUG | {"reason": "desync"}, BUG | {"reason": "desync", "step": 10}, False, False),  # found when compared
        (BUG | {"reason": "desync", "step": 7}, BUG | {"reason": "desync"}, False, True),  # equal in a checkpoint since
        (BUG | {"reason": "io"}, BUG | {"reason": "io"}, False, True),  # a disk may get room again
        (BUG | {"aftermath": True}, BUG | {"aftermath": True}, False, True),  # a node was lost
        (None, BUG, False, True),
    ],
    ids=[
        "same",
        "killed",
        "other step",
        "other error",
        "before training",
        "not finite",
        "inf after nan",
        "other weights",
        "other weights later",
        "disk",
        "lost node",
        "first",
    ],
)
def test_the_same_exception_after_the_same_step_twice_is_not_tried_again(run, before, now, killed, restarts):
    """Whichever rank or node raises it first; the others lose their connection."""
    first = begin(run)
    end_attempt(first, "crash", 5, 1)
    second = begin(run, 5)
    save(run, 7)
    if before is not None:
        say(first, 3, **before)
    say(second, 2, **now)
    say(second, 0, f"rank 0 {LOST}", aftermath=True, step=12, second=2**40)
    decision = decide_restart(second, find_first_failure(second, ended(1, -9 if killed else 0)), Workers(), parallel(3))
    assert told(decision)[2:] == (1, restarts)
    if not restarts:
        assert (decision.status, decision.reason, decision.step) == ("failed", "crash", 7)
        meaning = {
            "non_finite": "the data or the settings are the cause, not the machine",
            "desync": "the code gives ranks different weights, or that rank's machine computes wrong values each time",
        }.get(now.get("reason"), "not tried again")
        where = "before the next checkpoint" if now.get("reason") == "desync" else "after the same step"
        assert decision.message == f"the same error as in attempt 1, {where}: {meaning}"


@pytest.mark.parametrize("replay_on_failure", [True, False])
def test_a_loss_that_is_not_finite_is_tried_again_unless_that_is_turned_off(attempt, replay_on_failure):
    failure, settings = crash("non_finite"), parallel(3, replay_on_failure=replay_on_failure)
    assert told(decide_restart(attempt, failure, Workers(), settings)) == ("failed", "non_finite", 1, replay_on_failure)


def test_the_current_attempt_counts_before_its_end_is_written(run):
    attempts(run, (0, "crash"), (0, "crash"))
    assert not decide_restart(begin(run), crash(), Workers(), parallel(3)).restarts


def test_a_stop_that_could_not_be_saved_has_failed(attempt):
    decision = decide_restart(attempt, crash("io", 74), Workers(stop_signal="SIGTERM"), parallel(3))
    assert told(decision) == ("failed", "io", 74, False)


def test_a_final_reason_in_outcome_json_counts_even_if_rank_0_has_no_error_file(attempt):
    RunOutcomeWriter(attempt, owns=False).end("failed", "data", 65)
    assert told(decide_restart(attempt, crash(), Workers(), parallel(3))) == ("failed", "data", 65, False)


def test_max_restarts_0_means_no_restart(run, attempt):
    save(run, 5)
    assert told(decide_restart(attempt, crash(), Workers(), parallel(0))) == ("failed", "crash", 1, False)


def test_attempts_of_other_runs_do_not_count(run, tmp_path):
    other = RunDir(tmp_path / "other")
    attempts(other, *[(0, "crash")] * 5)
    assert decide_restart(Attempt(run, begin(run).number), crash(), Workers(), parallel(3)).restarts
