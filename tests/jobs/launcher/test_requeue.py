"""Requeue requests and their refusals, and takeovers between starts of a job: attempts on disk, without Slurm."""

from dataclasses import replace

import pytest

from fnet_dist.checkpoint.storage import checkpoint_steps
from fnet_dist.run import attempt as attempts
from fnet_dist.run.attempt import claim_attempt, count_stalled_attempts, last_attempt
from fnet_dist.run.notices import read_notices
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import open_run, read_json, run_dir_of, write_json
from jobs.launcher import requeue
from jobs.launcher.notifier import Notifier
from jobs.launcher.pack import _settled_code
from jobs.launcher.requeue import requeue_if_needed, requeue_refusal
from jobs.launcher.restart_policy import RestartDecision
from jobs.launcher.workers import Workers
from slurm.errors import EndingError, NoAnswerError, SlurmError
from slurm.job_env import read_allocation
from tests.helpers.starts import save, settings

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURMD_NODENAME": "node0",
    "SLURM_STEP_NODELIST": "node0",
    "SLURM_JOB_NODELIST": "node0",
}
JOB = read_allocation(TASK)


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path, resources={"max_requeues": 2}, parallel={"max_restarts": 3})


@pytest.fixture
def run(config):
    run = run_dir_of(config)
    run.path.mkdir(parents=True)
    write_json(run.manifest, {"id": "abc"})
    return run


def allocation(run, count, reason, job="7", step=None):
    """An allocation of `job` that has ended for `reason`, without a word if None, after a checkpoint of `step`."""

    def committed_step():
        return next(iter(checkpoint_steps(run)), 0)

    attempt = claim_attempt(
        run, committed_step=committed_step, slurm_job_id=job, slurm_restart_count=count, launch_id=None
    )
    if step is not None:
        save(run, step)
    if reason is not None:
        end_attempt(attempt, reason, step or 0, 75)


def test_max_requeues_counts_warnings_of_this_job_and_no_preemptions(run, config):
    allocation(run, 0, "signal_usr2", job="6", step=1)
    for count, reason in enumerate(["signal_usr2", "signal_term", "signal_term", "deadline", None]):
        allocation(run, count, reason, step=count + 2)
        assert requeue_refusal(JOB, run, config) is None
    allocation(run, 5, "signal_usr2", step=7)
    assert (
        requeue_refusal(JOB, run, config)
        == "it has been queued again 2 times (resources.max_requeues); run the same command to resume"
    )


def test_a_warning_before_a_preemption_does_not_count_either(run, config, monkeypatch):
    """With preempt_send_user_signal Slurm sends SIGUSR2 first; `scontrol show job` tells."""
    monkeypatch.setattr(requeue, "_is_preempted", lambda allocation: True)
    for count in range(4):
        allocation(run, count, "signal_usr2", step=count + 1)
        decision = RestartDecision("stopped", "signal_usr2", 75, count + 1)
        job = replace(JOB, restart_count=count)
        assert requeue_if_needed(job, run, config, decision, Workers(), Notifier(()), lambda asked: None) == 75
    assert requeue_refusal(JOB, run, config) is None
    for count in (4, 5):
        allocation(run, count, "signal_usr2", step=count + 1)
    assert requeue_refusal(JOB, run, config) is None
    allocation(run, 6, "signal_usr2", step=7)
    requeue._note_preemption(run, replace(JOB, restart_count=7))  # in which no attempt began
    assert "it has been queued again 2 times" in requeue_refusal(JOB, run, config)


def test_preemptions_that_save_nothing_new_are_no_lack_of_progress(run, config, monkeypatch):
    monkeypatch.setattr(requeue, "_is_preempted", lambda allocation: True)
    for count in range(4):
        allocation(run, count, "signal_usr2")
        requeue._note_preemption(run, replace(JOB, restart_count=count))
    assert requeue_refusal(JOB, run, config) is None


def test_with_no_requeues_allowed_the_first_warning_ends_the_job(run, config):
    never = config.model_copy(update={"resources": config.resources.model_copy(update={"max_requeues": 0})})
    allocation(run, 0, "signal_usr2", step=1)
    assert "it has been queued again 0 times" in requeue_refusal(JOB, run, never)


def test_allocations_that_save_no_new_checkpoint_end_the_job_earlier(run, config):
    many = config.model_copy(update={"resources": config.resources.model_copy(update={"max_requeues": 100})})
    allocation(run, 0, "signal_usr2", step=1)
    for count in (1, 2):
        allocation(run, count, "signal_usr2")
        assert requeue_refusal(JOB, run, many) is None
    allocation(run, 3, "signal_usr2")
    assert requeue_refusal(JOB, run, many).startswith(
        "3 attempts in a row have saved nothing new (parallel.max_restarts)"
    )


def test_a_run_whose_own_requeue_is_refused_is_not_started_again_by_that_of_a_run_that_shares_its_task(run, config):
    open_run(config)
    for count, reason in enumerate(["signal_usr2", "signal_usr2", "signal_usr2"]):
        allocation(run, count, reason, step=count + 1)
        write_json(run.outcome, {"status": "stopped", "reason": reason, "exit_code": 75})
        assert _settled_code(run, JOB) == (None if count < 2 else 75)


@pytest.mark.parametrize(
    ("jobs", "status", "code"),
    [
        (["7", "8"], "stopped", 75),
        (["7", None], "finished", 0),
        (["7", "7"], "stopped", None),
        (["6", "8"], "stopped", None),
    ],
    ids=["another job", "no job", "this job", "others before this job"],
)
def test_a_run_of_a_pack_that_has_been_started_elsewhere_meanwhile_is_left_alone(run, config, jobs, status, code):
    for count, job in enumerate(jobs):
        allocation(run, count, "signal_term", job=job)
    write_json(run.outcome, {"status": status, "reason": "signal_term", "exit_code": 75})
    open_run(config)
    assert _settled_code(run, JOB) == code
    run.attempt(3).mkdir()
    assert _settled_code(run, JOB) == code, "of whom it is, nobody knows"


def test_an_attempt_that_slurm_requeued_does_not_count_as_stalled(run):
    for count in range(3):
        allocation(run, count, None)
    claim_attempt(run, slurm_job_id="7", slurm_restart_count=3, launch_id=None)
    assert count_stalled_attempts(run, 0) == 1  # the last: nobody has started it again


@pytest.mark.parametrize("reason", ["finished", "stop_file", "wandb_stop", "signal_int", "signal_usr1", "crash"])
def test_every_other_reason_ends_the_job_without_asking_slurm(run, config, reason, monkeypatch):
    monkeypatch.setenv("PATH", "")  # there is nobody to ask
    allocation(run, 0, reason)
    decision = RestartDecision("stopped", reason, 75, 1)
    assert requeue_if_needed(JOB, run, config, decision, Workers(), Notifier(())) == 75


def test_one_refusal_after_a_long_silence_does_not_end_the_requeue(run, config, monkeypatch):
    """slurmctld comes back, and says something odd first."""
    monkeypatch.setattr(requeue, "REFUSED_S", 0.2)
    monkeypatch.setattr(requeue, "PAUSE_S", 0.05)
    allocation(run, 0, "signal_usr2", step=1)
    ranks = Workers()

    def answers():
        yield from [NoAnswerError("away")] * 6
        yield SlurmError("odd")
        ranks.stop_signal = "SIGTERM"
        yield None

    said = answers()

    def ask(job_id, restart_count):
        if (error := next(said)) is not None:
            raise error

    monkeypatch.setattr(requeue.client, "requeue", ask)
    assert requeue._requeue(JOB, ranks) is None
    monkeypatch.setattr(requeue.client, "requeue", lambda *words: (_ for _ in ()).throw(SlurmError("disabled")))
    assert requeue._requeue(JOB, Workers()) == "disabled; run the same command to resume"


def test_a_later_start_of_the_same_job_follows_at_once_and_another_job_waits(run, monkeypatch):
    """The owner is on another machine, shows no end, and cannot be seen."""
    monkeypatch.setattr(attempts, "STALE_S", 0.5)
    first = claim_attempt(run, slurm_job_id="7", slurm_restart_count=0, launch_id=None)
    write_json(first.begin, read_json(first.begin) | {"host": "elsewhere"})

    def asked():
        raise AssertionError("it waits")

    assert claim_attempt(run, asked, slurm_job_id="7", slurm_restart_count=1, launch_id=None).number == 2
    write_json(run.attempt(2) / "begin.json", read_json(run.attempt(2) / "begin.json") | {"host": "elsewhere"})
    with pytest.raises(AssertionError, match="it waits"):
        claim_attempt(run, asked, slurm_job_id="8", slurm_restart_count=5, launch_id=None)
    with pytest.raises(AssertionError, match="it waits"):
        claim_attempt(run, asked, slurm_job_id="7", slurm_restart_count=1, launch_id=None)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_requeue_is_told_before_slurm_is_asked_and_a_refusal_after_it(run, config, monkeypatch, is_refused):
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"alerts": "on"})})
    ranks, asked_after = Workers(), []

    def ask(job_id, restart_count):
        asked_after.append([notice["text"] for notice in read_notices(run)])
        ranks.stop_signal = "SIGTERM"
        if is_refused:
            raise EndingError("the job was cancelled")

    monkeypatch.setattr(requeue.client, "requeue", ask)
    monkeypatch.setattr(requeue.client, "show_job", lambda job_id: None)
    allocation(run, 0, "signal_usr2", step=1)
    with Notifier(()) as notifier:
        notifier.begin(last_attempt(run), config)
        requeue_if_needed(JOB, run, config, RestartDecision("stopped", "signal_usr2", 75, 1), ranks, notifier)
    told = ["r has stopped after step 1 (signal_usr2) and asks Slurm to queue its job again"]
    assert asked_after == [told]
    refusal = ["r has stopped after step 1 (signal_usr2): not queued again: the job was cancelled"]
    assert [notice["text"] for notice in read_notices(run)] == told + refusal * is_refused
