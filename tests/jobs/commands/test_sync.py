"""`fnet sync`: the real SDK, against the backend of tests/helpers/wandb_server.py."""

import signal
import socket
from pathlib import Path

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from tests.helpers.made_run import Made, make_run, train_line
from tests.helpers.processes import Ended, start, wait_until
from tests.helpers.tracked_runs import end, sync
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.processes

ROWS = 100 // 7 + 2  # one each 7 steps, and one at the end of each epoch


def make(root: Path, name: str, *, finished: bool = True, ranks: tuple[int, ...] = (2,)) -> RunDir:
    """Make a run of 100 steps whose id in W&B is 16 times the first letter of its name."""
    run = make_run(root, Made(name=name, steps_per_epoch=50, epochs=2, finished=finished, ranks=ranks))
    write_json(run.manifest, read_json(run.manifest) | {"id": 16 * name[0]})
    tracking = {"project": "typo", "entity": None, "name": f"{name}: lr=0.1/2", "group": "50 %?", "log_every_steps": 7}
    write_json(run.config, read_json(run.config) | {"tracking": {"wandb": "offline", "log_model": False} | tracking})
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make(tmp_path, "r")


def refused(run: RunDir, server: WandbServer, **environment: str) -> Ended:
    ended = end(("-m", "jobs", "sync", str(run.path)), **server.environment() | environment)
    assert [line for line in ended.err.splitlines() if not line.startswith("wandb: ")] == [ended.err.splitlines()[-1]]
    return ended


def test_a_run_that_was_deleted_in_wandb_is_sent_as_a_new_one(run: RunDir, server: WandbServer) -> None:
    sync(run, server)
    first = read_json(run.manifest)["id"]
    server.deleted = {first}
    del server.runs[first]
    ended = refused(run, server)
    assert ended.code == 1
    assert "previously created and deleted" in ended.err
    assert "--new-id is for a run that was deleted there" in ended.err
    assert f"r: {ROWS} rows sent, 0 were there" in sync(run, server, "--new-id")
    assert f"r: 0 rows sent, {ROWS} were there" in sync(run, server)
    ((number, sent),) = server.runs.items()
    assert number != first
    assert (sent.state, sent.display_name, sent.group) == ("finished", "r: lr=0.1/2", "50 %?")


def test_a_wrong_entity_and_project_are_corrected_for_all_later_attempts(run: RunDir, server: WandbServer) -> None:
    config = read_json(run.config)
    write_json(run.config, config | {"tracking": config["tracking"] | {"entity": "nobody"}})
    ended = refused(run, server)
    assert ended.code == 1
    assert "entity nobody not found" in ended.err
    assert "--entity and --project correct those" in ended.err
    sync(run, server, "--entity", "tester", "--project", "right")
    assert "0 rows sent" in sync(run, server)
    (sent,) = server.runs.values()
    assert (sent.entity, sent.project) == ("tester", "right")


def test_settings_that_the_sdk_refuses_are_one_line(run: RunDir, server: WandbServer) -> None:
    ended = refused(run, server, WANDB_BASE_URL="api.wandb.local")
    assert ended.code == 2
    assert "setting base_url 'api.wandb.local' (WANDB_BASE_URL, or W&B's settings file): " in ended.err


def test_all_runs_are_sent_and_one_that_is_refused_does_not_keep_the_others(
    tmp_path: Path, server: WandbServer
) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b", "c"):
        make(runs, name)
    (runs / "empty").mkdir()
    server.deleted = {16 * "b"}
    keyless = {**server.environment(), "WANDB_API_KEY": ""}
    with start("-m", "jobs", "sync", "--all", cwd=tmp_path, **keyless) as started:
        assert started.end().err.count("W&B cannot be reached from here: ") == 1  # not once for each run
    with start("-m", "jobs", "sync", "--all", cwd=tmp_path, **server.environment()) as started:
        ended = started.end(120)
    assert ended.code == 1
    assert "error: W&B has not taken all of b: " in ended.err
    assert sorted(server.runs) == [16 * "a", 16 * "c"]
    with start("-m", "jobs", "sync", "a", "c", cwd=tmp_path, **server.environment()) as started:
        ended = started.end(120)
    assert ended.code == 0, ended.err
    for name in ("a", "c"):
        assert f"{name}: 0 rows sent, {ROWS} were there" in ended.out


def test_ctrl_c_in_follow_sends_what_there_is_and_leaves_the_state_of_the_run(
    tmp_path: Path, server: WandbServer
) -> None:
    attempt = claim_attempt(RunDir(tmp_path / "r"), world_size=2)  # by this process: it counts as trained
    run = make(tmp_path, "r", finished=False)
    with start("-m", "jobs", "sync", str(run.path), "--follow", **server.environment()) as follower:
        shown = wait_until(lambda: server.runs.get(16 * "r"))
        wait_until(lambda: len(shown.history) > 3)
        follower.process.send_signal(signal.SIGINT)
        assert follower.end().code == 130
    assert (shown.exit_code, shown.preempting, shown.state) == (None, False, "running")
    assert "outcome/status" not in shown.summary
    end_attempt(attempt, "signal_usr2", 100, 75)
    assert not run.tracking_position.exists()  # rows were sent, but not until the end
    assert f"r: 0 rows sent, {len(shown.history)} were there" in sync(run, server)
    assert read_json(run.tracking_position)["number"] == len(shown.history)  # from which the next one goes on
    assert (shown.state, shown.summary["outcome/status"]) == ("preempted", "stopped")


def test_attempts_their_host_and_commit_are_shown_and_ranks_that_are_gone_leave_the_summary(
    tmp_path: Path, server: WandbServer
) -> None:
    first = claim_attempt(RunDir(tmp_path / "r"), world_size=3, nodes="node[0-1]")
    run = make(tmp_path, "r", finished=False, ranks=(3,))
    sync(run, server)
    shown = server.runs[16 * "r"]
    assert {"loss/rank_0", "loss/rank_1", "loss/rank_2"} <= {*shown.summary}
    end_attempt(first, "signal_usr2", 100, 75)
    claim_attempt(run, world_size=2)
    window = {"kind": "window", "first_step": 101, "last_step": 114, "samples_per_second": 640.0, "step_ms": 100.0}
    window |= {"slowest_rank": None, "max_over_median": None, "max_memory_gib": 1.0, "world_size": 2, "attempt": 2}
    metrics_log.append(run.metrics_log, [*(train_line(step, 2, epoch=3) for step in range(101, 115)), window])  # type: ignore[list-item]
    sync(run, server)
    assert {key for key in shown.summary if key.startswith("loss/rank_")} == {"loss/rank_0", "loss/rank_1"}
    assert [row["trainer/step"] for row in shown.history if row.get("trainer/resumed")] == [105]
    one, two = (shown.summary["attempts"][number] for number in ("1", "2"))
    assert (one["reason"], one["nodes"], one["ranks"]) == ("signal_usr2", "node[0-1]", 3)
    assert (one["first_step"], one["last_step"]) == (1, 100)
    assert (two["reason"], two["nodes"], two["ended"]) == ("stopped", socket.gethostname(), None)
    assert two["samples_per_second"] == pytest.approx(640)
    assert one["began"] <= one["ended"]
    assert shown.attributes["host"] == socket.gethostname()
    assert shown.attributes["commit"] == read_json(run.manifest)["git"]["commit"]
