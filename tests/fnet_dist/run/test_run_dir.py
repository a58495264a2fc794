"""The run directory: private, its files written atomically, found by name."""

import json
import os
import resource
from pathlib import Path

import pytest

from fnet_dist.errors import ConfigError, StorageError
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import end_attempt, read_outcome
from fnet_dist.run.run_dir import (
    RunDir,
    find_run,
    open_manifest,
    open_run,
    read_json,
    read_manifest,
    run_dir_of,
    write_atomically,
    write_json,
    write_manifest,
)
from tests.helpers.config import FashionConfig
from tests.helpers.made_run import Made, make_run


def settings(root, **sections):
    run = {"name": "r", "root": str(root), **sections.pop("run", {})}
    return FashionConfig.model_validate({"run": run, "data": {"dataset": "synthetic"}, **sections})


def begin(config):
    """Write the files of an attempt that has ended: begin.json and end.json, config.json and manifest.json."""
    end_attempt(claim_attempt(run_dir_of(config)), "crash", 0, 1)
    return open_run(config)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_run_directory_has_these_paths():
    run = RunDir(Path("runs/r"))
    paths = [
        run.config,
        run.manifest,
        run.metrics_log,
        run.model,
        run.predictions,
        run.outcome,
        run.attempts,
        run.report,
    ]
    assert [str(path) for path in paths] == [
        "runs/r/config.json",
        "runs/r/manifest.json",
        "runs/r/metrics.jsonl",
        "runs/r/model.safetensors",
        "runs/r/predictions.safetensors",
        "runs/r/outcome.json",
        "runs/r/attempts",
        "runs/r/report",
    ]
    assert (run.name, str(run.attempt(3))) == ("r", "runs/r/attempts/0003")
    assert (str(run.checkpoints), str(run.stop)) == ("runs/r/checkpoints", "runs/r/STOP")
    assert str(run.checkpoint(938)) == "runs/r/checkpoints/step_00000938"


def test_only_the_user_can_open_the_run_directory(tmp_path):
    before = os.umask(0)
    try:
        run = begin(settings(tmp_path / "runs"))
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o7777 == 0o700
    assert run.path.parent.stat().st_mode & 0o7777 == 0o777, "the folder of all runs is as the user's umask says"


def test_open_run_writes_every_setting_for_a_restart_that_resumes(tmp_path, monkeypatch):
    """The root is absolute, for a restart from any directory; `required`, `new` and PATH apply to one start only."""
    monkeypatch.chdir(tmp_path)
    config = settings("runs", optim={"lr": 0.5}, checkpoint={"resume": "required"})
    run = begin(config)
    expected = config.model_dump(mode="json")
    expected["run"]["root"] = str(tmp_path / "runs")
    expected["checkpoint"]["resume"] = "auto"
    assert read_json(run.config) == expected
    assert {path.name for path in run.path.iterdir()} == {"config.json", "manifest.json", "attempts", "logs"}


def test_later_attempts_do_not_change_the_id_and_origin_of_a_run(tmp_path):
    run = begin(settings(tmp_path))
    first = read_json(run.manifest)
    assert [*first] == ["format", "id", "resumed_from"]
    assert (first["format"], first["resumed_from"]) == (2, None)
    assert len(first["id"]) == 16
    write_manifest(run, {"dataset": {"name": "a"}, "world_size": 2, "resumed_from": "elsewhere", "id": "0"})
    write_manifest(run, {"world_size": 4})
    open_run(settings(tmp_path))
    open_manifest(run, {"path": "elsewhere", "step": 3})
    assert read_json(run.manifest) == {**first, "dataset": {"name": "a"}, "world_size": 4}
    assert read_json(begin(settings(tmp_path / "other")).manifest)["id"] != first["id"]


def test_an_atomic_write_on_a_full_disk_keeps_the_old_content(tmp_path):
    path = tmp_path / "outcome.json"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # beyond it, writing fails
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["outcome.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_atomic_write_to_a_directory_fails_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_json_file_reads_as_none(tmp_path):
    assert read_json(tmp_path / "a.json") is None
    assert read_outcome(RunDir(tmp_path)) is None
    write_json(tmp_path / "a.json", {"ä": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1.5, None]}


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"null", b"\0" * 80, b"\xff\xfe"])
def test_damaged_json_is_read_like_a_file_that_is_missing(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert read_json(tmp_path / "manifest.json") is None
    with pytest.raises(StorageError, match=r"manifest\.json is missing or damaged; start the run again") as caught:
        read_manifest(RunDir(tmp_path))
    assert caught.value.exit_code == 74


# Finding --------------------------------------------------------------------------------------------------------------


def test_the_root_of_the_runs_may_start_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(run_dir_of(settings("~/runs")).path) == "/home/someone/runs/r"


@pytest.fixture
def three_runs(tmp_path):
    """Make runs whose order by age is not that of their names, and a folder that is no run."""
    runs = tmp_path / "runs"
    (runs / "notes").mkdir(parents=True)
    for age, name in enumerate(("b", "c", "a")):
        path = make_run(runs, Made(name=name, steps=1)).path
        os.utime(path, (1_790_000_000 - age, 1_790_000_000 - age))
    return runs


def test_a_run_is_found_by_its_name_or_its_directory(three_runs, monkeypatch):
    assert find_run("a", three_runs).path == three_runs / "a"
    assert find_run(str(three_runs / "a")).path == three_runs / "a"
    monkeypatch.chdir(three_runs.parent)
    assert find_run("a").path == three_runs / "a"
    assert find_run("runs/c/").path == three_runs / "c"
    monkeypatch.chdir(three_runs / "b")
    assert find_run(".").path == three_runs / "b"
    assert find_run(".").name == "b"


def test_without_a_name_the_newest_run_is_found(three_runs):
    assert find_run(None, three_runs).name == "b"
    os.utime(three_runs / "a")
    assert find_run(None, three_runs).name == "a"


@pytest.mark.parametrize("text", ["d", "notes", "", "a/metrics.jsonl"])
def test_an_unknown_run_is_refused_with_the_newest_names(three_runs, text):
    with pytest.raises(ConfigError) as caught:
        find_run(text, three_runs)
    assert f"no run {text!r}: neither a name under {three_runs}" in str(caught.value)
    assert str(caught.value).endswith("newest there: b, c, a")


def test_without_any_run_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no run in .*; start one: fnet run jobs/quickstart\.toml"):
        find_run(None, tmp_path)
    with pytest.raises(ConfigError, match=r"newest there: none$"):
        find_run("d", tmp_path)


def test_made_runs_have_a_config_that_is_plain_json(three_runs):
    assert json.loads((three_runs / "a" / "config.json").read_text())["run"]["name"] == "a"
