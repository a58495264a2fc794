"""Which failures count on which node, by files of attempts; a real job is in test_on_slurm.py."""

from dataclasses import replace

import pytest

from fnet_dist.checkpoint.storage import newest_step
from fnet_dist.distributed.launch_env import LaunchEnv, write_error_file
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.failure import AttemptFailure, RankFailure
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import run_dir_of, write_json
from jobs.launcher import requeue
from jobs.launcher.bad_nodes import failures_by_bad_node, was_trained_later
from jobs.launcher.node_spec import NodeSpec
from jobs.launcher.repeated_steps import RepeatedSteps, steps_to_repeat
from jobs.launcher.restart_policy import RestartDecision, describe_failure
from slurm.job_env import read_allocation
from tests.helpers.starts import save, settings

TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
TASK |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1,n2"}
FOUR_RANKS = NodeSpec(2, 0, 2, nodes=("n1", "n2"))


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path)


@pytest.fixture
def run(config):
    run = run_dir_of(config)
    run.path.mkdir()
    write_json(run.manifest, {"id": "abc"})
    return run


def fail(run, reason, node, step=None, job="7"):
    """An attempt of `job` that failed at `step` for `reason`, by the rank on `node`."""
    attempt = claim_attempt(run, committed_step=lambda: newest_step(run), slurm_job_id=job, launch_id=None)
    failure = {"reason": reason, "message": f"{reason} of rank 2", "rank": 2, "node": node, "step": step}
    end_attempt(attempt, reason, 0, 1, failure=failure)


@pytest.mark.parametrize("reason", ["crash", "hang", "desync"])
def test_the_second_failure_on_a_node_makes_it_bad(run, config, reason):
    fail(run, reason, "n2")
    fail(run, "crash", "n1")
    fail(run, "crash", None)
    assert failures_by_bad_node(run, config, "7") == {}
    fail(run, reason, "n2")
    lines = [f"attempt {number}: {reason} of rank 2" for number in (1, 4)]
    assert failures_by_bad_node(run, config, "7") == {"n2": lines}
    never = config.model_copy(update={"resources": config.resources.model_copy(update={"max_node_failures": None})})
    assert failures_by_bad_node(run, never, "7") == {}


def test_weights_that_differ_later_do_not_show_that_they_were_equal_before(run):
    """A desync is found at the next hash or checkpoint, which need not be at the same step again."""
    first = AttemptFailure("desync", "rank 0 has other weights", 0, "n1", 30)
    later = [replace(first, step=50), replace(first, reason="non_finite", step=60)]
    assert not was_trained_later(run, first, later)
    repeated = RepeatedSteps(claim_attempt(run, launch_id=None), first)
    repeated.judge(later[0])
    assert repeated.verdict == "failed again"
    loss = replace(first, reason="non_finite")
    assert was_trained_later(run, loss, [replace(first, step=30)]), "the loss of that step was finite"
    assert not was_trained_later(run, loss, [replace(loss, step=30)])
    save(run, 30)
    assert was_trained_later(run, first, later)


def test_a_failure_counts_before_its_end_is_written(run, config):
    fail(run, "crash", "n2")
    last = claim_attempt(run, slurm_job_id="7", launch_id=None)
    failure = AttemptFailure("hang", "it hangs", 2, "n2", 5)
    assert [*failures_by_bad_node(run, config, "7", (last, failure))] == ["n2"]


def test_stops_full_disks_and_other_jobs_do_not_count(run, config):
    for reason, job in (("signal_usr2", "7"), ("io", "7"), ("crash", "6"), ("crash", "7")):
        fail(run, reason, "n2", job=job)
    assert failures_by_bad_node(run, config, "7") == {}


def test_a_loss_that_is_not_finite_counts_once_the_same_step_was_trained(run, config):
    for _ in range(2):
        fail(run, "non_finite", "n2", step=30)
    assert failures_by_bad_node(run, config, "7") == {}, "the data may be the cause"
    save(run, 29)
    assert failures_by_bad_node(run, config, "7") == {}
    save(run, 30)
    assert [*failures_by_bad_node(run, config, "7")] == ["n2"]


@pytest.mark.parametrize(("reason", "is_seen"), [("desync", True), ("crash", False)])
def test_a_later_failure_at_a_later_step_shows_that_the_step_was_trained(run, config, reason, is_seen):
    """But a crash does not: it may lie in a window whose losses nobody has seen."""
    fail(run, "non_finite", "n2", step=30)
    fail(run, "non_finite", "n2", step=40)
    fail(run, reason, "n1", step=50)
    assert [*failures_by_bad_node(run, config, "7")] == ["n2"] * is_seen


@pytest.mark.parametrize(
    ("cause", "node"),
    [
        (RankFailure(0, "desync", 1, "rank 3 has other weights", ranks_at_fault=(3,)), "n2"),
        (RankFailure(0, "desync", 1, "rank 0 or rank 1 has other weights", ranks_at_fault=()), None),
        (RankFailure(1, "crash", 1, "was killed", ranks_at_fault=(1,)), "n1"),
        (RankFailure(0, "hang", 1, "ranks 2 and 3 are silent", ranks_at_fault=(2, 3)), "n2"),
        (RankFailure(0, "hang", 1, "ranks 1 and 2 are silent", ranks_at_fault=(1, 2)), None),
        (RankFailure(0, "crash", 1, "rank 0 lost the connection", aftermath=True, ranks_at_fault=(0,)), "n2"),
    ],
    ids=["rank at fault", "one of two", "killed", "node", "two nodes", "ranks that wrote nothing"],
)
def test_the_node_is_that_of_the_rank_at_fault(run, cause, node):
    attempt = claim_attempt(run, launch_id=None)
    for rank in (0, 1):  # all that is known of ranks 2 and 3 is that they are gone
        write_error_file(LaunchEnv(error_file=attempt.error(rank)), "lost the connection", "", "crash", aftermath=True)
    assert describe_failure(attempt, cause, FOUR_RANKS).node == node
    one = replace(FOUR_RANKS, nnodes=1, nproc_per_node=4, nodes=("n1",))
    assert describe_failure(attempt, cause, one).node == "n1", "there is no other"


@pytest.mark.parametrize(
    ("resources", "parallel", "restarts", "reason"),
    [
        ({}, {}, True, "bad_node"),
        ({}, {}, False, "bad_node"),  # a desync that came again: on another node it may not come
        ({"max_requeues": 0}, {}, True, "desync"),
        ({}, {"max_restarts": 0}, False, "desync"),
    ],
    ids=["restart", "repeated", "max_requeues", "max_restarts"],
)
def test_a_requeue_for_a_bad_node_is_one_of_max_requeues_and_none_follows_without_restarts(
    run, resources, parallel, restarts, reason, monkeypatch
):
    monkeypatch.setattr(requeue, "nodes_to_exclude", lambda job, names: names)  # Slurm has others
    fail(run, "crash", "n1")
    attempt = claim_attempt(run, slurm_job_id="7", launch_id=None)
    failure = AttemptFailure("desync", "rank 0 has other weights", 0, "n1", 5)
    node_spec = replace(FOUR_RANKS, allocation=read_allocation(TASK))
    decision = RestartDecision("failed", "desync", 1, 0, restarts=restarts)
    changed = settings(run.path.parent, resources=resources, parallel=parallel)
    found = requeue.requeue_instead(decision, node_spec, attempt, changed, failure)
    assert (found.reason, found.restarts) == (reason, restarts and reason == "desync")


@pytest.mark.parametrize(
    ("restarts", "job", "parallel", "repeats"),
    [
        (True, None, {}, True),
        (False, "7", {}, True),
        (False, "8", {}, False),
        (False, None, {}, False),
        (True, None, {"replay_on_failure": False}, False),
    ],
    ids=["same launcher", "same job", "another job", "another start", "turned off"],
)
def test_only_what_goes_on_as_it_was_tells_the_data_from_the_machine(run, restarts, job, parallel, repeats):
    """Before another start, somebody may have repaired the code."""
    attempt = claim_attempt(run, slurm_job_id="7", launch_id=None)
    failure = {"reason": "non_finite", "message": "loss is nan", "rank": 1, "node": None, "step": 5}
    end_attempt(attempt, "non_finite", 0, 1, restarts=restarts, failure=failure)
    assert (steps_to_repeat(attempt, settings(run.path.parent, parallel=parallel), job) is not None) == repeats
