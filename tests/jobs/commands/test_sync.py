"""`fnet sync` corrects where a run is sent: the real SDK, against the backend of tests/helpers/wandb_server.py."""

from pathlib import Path

import pytest

from fnet_dist.run.run_dir import RunDir, read_json, write_json
from tests.helpers.made_run import Made, make_run
from tests.helpers.processes import Ended
from tests.helpers.tracked_runs import end, sync
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.processes

ROWS = 100 // 7 + 2  # one each 7 steps, and one at the end of each epoch


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path, Made(name="r", steps_per_epoch=50, epochs=2))
    write_json(run.manifest, read_json(run.manifest) | {"id": "0123456789abcdef"})
    tracking = {"project": "typo", "entity": None, "name": "r: lr=0.1/2", "group": "50 %?", "log_every_steps": 7}
    write_json(run.config, read_json(run.config) | {"tracking": {"wandb": "offline", "log_model": False} | tracking})
    return run


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
