"""Starts in a directory: begin, resume, show the finished run, or refuse."""

import re
import subprocess
import sys

import pytest

from fnet_dist.checkpoint.resume import (
    check_run,
    choose_run,
    finished_note,
    old_word_note,
    prepare_run,
    resume_mode,
    start_attempt,
    starts_new_run,
)
from fnet_dist.checkpoint.storage import newest_valid
from fnet_dist.config.load import read_config
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import restore_config
from fnet_dist.run.outcome import end_attempt, read_outcome
from fnet_dist.run.run_dir import read_json, run_dir_of, write_json, write_manifest
from tests.helpers.config import FashionConfig
from tests.helpers.log_lines import log_lines
from tests.helpers.starts import begin, leave, refusal, save, settings

RESUME = "--checkpoint.resume"

# Again in the same directory ------------------------------------------------------------------------------------------


def test_checking_a_new_name_writes_nothing(tmp_path):
    for resume in ("auto", "new"):
        assert check_run(settings(tmp_path, resume)) is None
        assert choose_run(settings(tmp_path, resume), LaunchEnv()).name == "r"
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_returns_its_outcome(tmp_path):
    config = settings(tmp_path)
    leave(config)
    assert check_run(config)["status"] == "finished"


@pytest.mark.parametrize(
    "other",
    [
        {"run": {"epochs": 3}},
        {"run": {"max_steps": 5}},
        {"parallel": {"timeout_s": 9.0, "max_restarts": 0}},
        {"checkpoint": {"keep_last": 9, "every_seconds": 1.0, "every_steps": 3}},
        {"data": {"dataset": "synthetic", "root": "/elsewhere"}},
        {"data": {"dataset": "auto"}},
    ],
    ids=str,
)
def test_settings_that_do_not_change_the_result_may_differ(tmp_path, other):
    run = leave(settings(tmp_path), steps=(1,))
    config = settings(tmp_path).model_dump() | settings(tmp_path).model_dump(include={*other})
    for section, values in other.items():
        config[section] = config[section] | values
    config = FashionConfig.model_validate(config)
    assert check_run(config)["status"] == "finished"
    write_json(run.outcome, {"status": "failed"})
    assert check_run(config) is None


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        ({"epochs": 10}, {"epochs": 11}, True),
        ({"epochs": 10}, {"epochs": 20, "max_steps": 5}, True),
        ({"epochs": 10}, {"epochs": 10, "max_steps": 5}, False),
        ({"epochs": 10}, {"epochs": 9}, False),
        ({"max_steps": 8}, {"max_steps": 9}, True),
        ({"max_steps": 8}, {"max_steps": None}, True),
        ({"max_steps": 8}, {"max_steps": 8}, False),
        ({"max_steps": 8}, {"max_steps": 7}, False),
    ],
    ids=str,
)
def test_a_finished_run_trains_on_if_it_is_made_longer(tmp_path, before, now, goes_on):
    leave(settings(tmp_path, run=before))
    assert (check_run(settings(tmp_path, run=now)) is None) == goes_on


def test_a_run_that_was_made_longer_stays_longer(tmp_path):
    leave(settings(tmp_path, run={"epochs": 1}))
    longer = settings(tmp_path, run={"epochs": 2})
    leave(longer)
    assert check_run(longer)["status"] == "finished"
    assert read_config(run_dir_of(longer).config).run.epochs == 2


@pytest.mark.parametrize("status", [None, "failed", "stopped"])
def test_an_unfinished_run_is_resumed_in_its_directory(tmp_path, status):
    config = settings(tmp_path)
    run = leave(config, status, steps=(1,))
    if status is None:
        run.outcome.unlink()
    assert check_run(config) is None
    assert choose_run(config, LaunchEnv()) == run
    assert begin(config)[1] == run
    assert [path.name for path in sorted(run.attempts.iterdir())] == ["0001", "0002"]


def test_a_run_without_any_step_can_be_started_again(tmp_path):
    config = settings(tmp_path)
    begin(config)
    assert check_run(config) is None


# Other settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_other_settings_are_refused_with_each_difference_and_both_fixes(tmp_path, status):
    run = leave(settings(tmp_path), status, steps=(5, 30, 200))
    text = refusal(settings(tmp_path, optim={"lr": 0.5}, run={"seed": 3}))
    assert "holds a run with other settings (run.seed: 0 -> 3; optim.lr: 0.001 -> 0.5); use" in text
    assert "use --run.name r-2 for a new run" in text
    assert text.endswith(f"and {RESUME} {run.checkpoint(200)} to start it from there")


def test_the_fix_that_the_refusal_names_works(tmp_path):
    run = leave(settings(tmp_path), steps=(5,))
    other = settings(tmp_path, run.checkpoint(5), optim={"lr": 0.5})
    assert check_run(other) is None
    assert begin(other)[1].name == "r-2"


def test_the_refusal_names_no_checkpoint_if_there_is_none(tmp_path):
    leave(settings(tmp_path))
    assert RESUME not in refusal(settings(tmp_path, run={"seed": 3}))


def test_another_dataset_is_refused(tmp_path):
    leave(settings(tmp_path))
    assert "data.dataset: synthetic -> fashion-mnist" in refusal(settings(tmp_path, data={"dataset": "fashion-mnist"}))


@pytest.mark.parametrize("status", ["finished", "stopped"])
@pytest.mark.parametrize("epochs", [9, 20])
def test_more_epochs_are_refused_if_a_schedule_depends_on_them(tmp_path, status, epochs):
    """Another number of epochs would change the learning rate of the steps already trained."""
    schedule = {"name": "cosine"}
    leave(settings(tmp_path, schedule=schedule), status, steps=(5,))
    text = refusal(settings(tmp_path, schedule=schedule, run={"epochs": epochs}))
    assert f"(run.epochs: 10 -> {epochs})" in text
    assert f": schedule.name cosine was stretched over 10 epochs, not {epochs}; use" in text
    assert check_run(settings(tmp_path, schedule=schedule, run={"max_steps": 99})) is None or status == "finished"


# required -------------------------------------------------------------------------------------------------------------


def test_required_refuses_to_start_without_a_checkpoint(tmp_path):
    required = settings(tmp_path, "required")
    text = refusal(required)
    assert text == (
        f"checkpoint.resume required: no checkpoint in {tmp_path / 'r' / 'checkpoints'}; see --run.name, or use auto"
    )
    _, run = begin(settings(tmp_path))
    assert refusal(required) == text
    save(run, 5)
    assert check_run(required) is None
    assert choose_run(required, LaunchEnv()) == run


def test_required_applies_to_one_start_only(tmp_path):
    """A restart reads config.json, and must not fail because the first checkpoint is not yet saved."""
    _, run = begin(settings(tmp_path))
    save(run, 5)
    config, _ = begin(settings(tmp_path, "required"))
    assert config.checkpoint.resume == "auto"
    assert read_config(run.config).checkpoint.resume == "auto"


def test_required_shows_a_finished_run_and_refuses_other_settings(tmp_path):
    leave(settings(tmp_path), steps=(5,))
    assert check_run(settings(tmp_path, "required"))["status"] == "finished"
    assert "seed: 0 -> 1" in refusal(settings(tmp_path, "required", run={"seed": 1}))


@pytest.mark.parametrize(("old", "new"), [("must", "required"), ("never", "new")])
def test_an_old_word_means_the_new_one(tmp_path, old, new):
    before, now = settings(tmp_path, old), settings(tmp_path, new)
    assert (resume_mode(before), resume_mode(now)) == (new, new)
    assert starts_new_run(before) == starts_new_run(now) == (new == "new")
    assert old_word_note(before) == f"note: checkpoint.resume {old} is now called {new}"
    assert old_word_note(now) is old_word_note(settings(tmp_path)) is None


def test_an_old_word_in_a_config_json_is_read_with_one_line_of_note(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, settings(tmp_path, "must").model_dump(mode="json"))
    command = [sys.executable, "-m", "fnet_dist.train", "--config", path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "note: checkpoint.resume must is now called required\n")
    [error] = ended.stderr.splitlines()
    assert error.startswith(f"error: checkpoint.resume required: no checkpoint in {tmp_path / 'r' / 'checkpoints'}")


# Claiming -------------------------------------------------------------------------------------------------------------


def test_begin_json_holds_the_settings_and_the_committed_step(tmp_path):
    config, run = begin(settings(tmp_path), launch_id="abc")
    save(run, 5)
    (run.checkpoints / ".step_00000009-half").mkdir()
    longer = settings(tmp_path, run={"epochs": 20})
    config, attempt = start_attempt(longer, run, launch_id="abc", world_size=4, address="node0:1")
    begun = read_json(attempt.begin)
    assert (begun["launch_id"], begun["committed_step"], begun["world_size"]) == ("abc", 5, 4)
    assert (begun["address"], begun["settings"]) == ("node0:1", config.model_dump(mode="json"))
    assert begun["settings"]["run"]["epochs"] == read_json(run.config)["run"]["epochs"] == 20
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000005"], "what a kill left is removed"
    end_attempt(attempt, "crash", 0, 1)


def test_a_run_that_finished_before_the_claim_is_refused(tmp_path):
    config = settings(tmp_path)
    run = leave(config)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ConfigError, match="was finished by another start meanwhile; start again to see its table"):
        start_attempt(config, run)
    assert sorted(run.path.rglob("*")) == before


def test_a_run_with_other_settings_is_not_claimed(tmp_path):
    """Its owner may have made it between the check and the claim."""
    run = leave(settings(tmp_path))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        start_attempt(settings(tmp_path, run={"seed": 5}), run)
    assert read_json(run.config)["run"]["seed"] == 0


@pytest.mark.parametrize(
    ("saved", "asked", "refused"),
    [((), 60, True), ((40,), 60, True), ((100,), 60, False), ((), 100, False), ((40,), None, False)],
)
def test_an_end_before_logged_steps_is_refused(tmp_path, saved, asked, refused):
    """Killed at step 100, saved at 40: with an end at step 60 the log would not match the final weights."""
    run = leave(settings(tmp_path, run={"epochs": 2}), "failed", steps=saved)
    write_manifest(run, {"dataset": {"train_count": 64 * 80}})
    metrics_log.append(run.metrics_log, [{"kind": "train", "step": step, "attempt": 1} for step in range(2, 101)])
    config = settings(tmp_path, run={"epochs": 2, "max_steps": asked})
    if refused:
        assert refusal(config) == (
            f"{run.path} has logged step 100 and resumes from step {sum(saved)}; it cannot end at step 60 in "
            "between: use --run.max-steps 100 or more, or another --run.name"
        )
    else:
        assert check_run(config) is None


def test_a_finished_run_that_was_prepared_to_be_longer_trains_on(tmp_path):
    """config.json holds the new length before any rank has trained it."""
    short = settings(tmp_path, run={"max_steps": 8})
    run = leave(short, steps=(8,))
    write_json(run.manifest, read_json(run.manifest) | {"dataset": {"train_count": 6400}})
    write_json(run.outcome, read_outcome(run) | {"step": 8})
    (run.path / "STOP").touch()
    longer = prepare_run(settings(tmp_path, run={"max_steps": 9}))
    assert check_run(longer) is None
    assert not run.stop.exists()
    assert check_run(short) is not None


# Small files that are empty or damaged --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "outcome.json", "begin.json", "end.json"])
@pytest.mark.parametrize("content", ["", '{"form'], ids=["empty", "torn"])
def test_a_damaged_small_file_blocks_no_good_checkpoint(tmp_path, name, content):
    config = settings(tmp_path)
    run = leave(config, "stopped", steps=(1,))
    identity = read_json(run.manifest)["id"]
    path = run.path / name if (run.path / name).exists() else run.attempt(1) / name
    path.write_text(content, encoding="utf-8")
    assert check_run(config) is None
    with log_lines() as lines:
        begin(config)
    assert lines == [
        f"WARNING: {run.path}: empty or damaged: {path.relative_to(run.path)}; checkpoints and metrics are not "
        "concerned, and a start goes on"
    ]
    assert newest_valid(run, read_json(run.manifest)["id"]).values["step"] == 1
    assert read_json(run.manifest)["id"] == identity, "W&B knows the run by it"
    assert read_config(run.config).run.name == "r"


def test_without_config_json_other_settings_are_still_refused(tmp_path):
    run = leave(settings(tmp_path), "stopped", steps=(1,))
    run.config.write_text("")
    assert "run.seed: 0 -> 1" in refusal(settings(tmp_path, run={"seed": 1}))


def test_a_damaged_config_json_is_restored_for_a_job_that_is_queued_again(tmp_path):
    run = leave(settings(tmp_path, run={"seed": 5}), "stopped")
    before = read_config(run.config)
    run.config.write_text('{"run": {"na')
    with log_lines() as lines:
        restore_config(run)
        restore_config(run)
    assert read_config(run.config) == before
    assert lines == [f"WARNING: {run.config} was empty or damaged; written anew from the last attempt's settings"]


def test_a_finished_run_with_a_damaged_config_json_is_still_finished(tmp_path):
    run = leave(settings(tmp_path))
    run.config.write_text("{")
    assert check_run(settings(tmp_path))["status"] == "finished"
    assert finished_note(settings(tmp_path)).startswith("finished before: nothing is trained now\nto train longer")
    assert read_config(run.config).run.name == "r"


def test_a_start_of_a_finished_run_changes_the_tracking_settings_that_it_gives(tmp_path):
    run = leave(settings(tmp_path, tracking={"group": "sweep"}))
    assert "tracking" not in finished_note(settings(tmp_path))
    note = finished_note(settings(tmp_path, tracking={"entity": "team", "wandb": "online"}))
    assert re.search(r"^tracking settings changed; to send the run with them: \S+ sync ", note, re.M)
    found = read_config(run.config).tracking
    assert (found.entity, found.wandb, found.group) == ("team", "online", "sweep")
