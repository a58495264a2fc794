"""Checkpoints on disk: complete or absent after any fault, and read only if every byte is as written."""

import os
from pathlib import Path
from random import Random

import pytest

from fnet_dist.checkpoint import storage as checkpoint_dir
from fnet_dist.checkpoint.storage import (
    bytes_needed,
    checkpoint_steps,
    find_corruption,
    newest_valid,
    read_checkpoint,
    remove_temp_dirs,
    save_checkpoint,
)
from fnet_dist.errors import CheckpointError, LostOwnershipError
from fnet_dist.run.run_dir import RunDir
from tests.helpers.checkpoint_corruption import corruptions
from tests.helpers.checkpoint_faults import (
    RUN_ID,
    full_disks,
    hidden,
    make_content,
    names,
    newest_without_warning,
    same,
    save,
    save_kills,
    spoil,
)
from tests.helpers.log_lines import log_lines

SEED = 20261124


# Saved and read -------------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_read_back_byte_for_byte(made):
    run, contents = made
    assert checkpoint_steps(run) == [30, 20, 10]
    for content in contents:
        assert same(read_checkpoint(run.checkpoint(content.values["step"]), RUN_ID), content)
    assert same(newest_valid(run, RUN_ID), contents[-1])


def test_a_run_without_checkpoints_has_none(tmp_path):
    run = RunDir(tmp_path)
    assert checkpoint_steps(run) == []
    assert newest_valid(run, RUN_ID) is None
    run.checkpoints.mkdir()
    assert newest_valid(run, RUN_ID) is None
    remove_temp_dirs(run)


def test_a_checkpoint_is_three_private_files_of_the_size_bytes_needed(made):
    run, contents = made
    files = list(run.checkpoint(30).iterdir())
    assert {path.name for path in files} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.stat().st_mode & 0o117 for path in files} == {0}
    assert sum(path.stat().st_size for path in files) == bytes_needed(contents[-1])


def test_steps_are_sorted_as_numbers(made):
    run, _ = made
    save(run, make_content(100_000_000, Random(1)))
    save(run, make_content(99_999_999, Random(2)))
    assert checkpoint_steps(run)[:3] == [100_000_000, 99_999_999, 30]
    assert newest_valid(run, RUN_ID).values["step"] == 100_000_000


def test_all_files_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    """A kill does no harm without fsync, a power cut does: the order of these calls prevents that."""
    calls = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recorded_rename(source, target):
        calls.append(("rename", Path(target).name))
        rename(source, target)

    run = RunDir(tmp_path / "r")
    run.path.mkdir()
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save_checkpoint(run, make_content(10, Random(1)), 1, lambda: calls.append(("may it be committed?", "")))
    (temporary,) = {name for _, name in calls if name.startswith(".step_00000010-")}
    assert calls == [
        ("fsync", "model.safetensors"),
        ("fsync", "optimizer.safetensors"),
        ("fsync", "state.json"),
        ("fsync", temporary),
        ("may it be committed?", ""),
        ("rename", "step_00000010"),
        ("fsync", "checkpoints"),
    ]


def test_a_refused_commit_leaves_nothing(made):
    run, contents = made
    spoil(run, 30)
    before = names(run)

    def refuse():
        assert len(hidden(run)) == 1, "all is written by now"
        raise LostOwnershipError

    with pytest.raises(LostOwnershipError):
        save_checkpoint(run, contents[-1], 7, refuse)
    with pytest.raises(LostOwnershipError):
        save_checkpoint(run, make_content(40, Random(1)), 7, refuse)
    assert names(run) == before
    assert find_corruption(run.checkpoint(30)) is not None


def test_values_that_are_no_json_leave_nothing(made):
    run, contents = made
    content = checkpoint_dir.CheckpointBytes({**contents[0].values, "step": 40, "loss": float("nan")}, b"", b"")
    with pytest.raises(ValueError, match="JSON"):
        save(run, content)
    assert names(run) == ["step_00000010", "step_00000020", "step_00000030"]


def test_a_valid_checkpoint_of_the_same_step_is_kept(made):
    run, contents = made
    save(run, make_content(30, Random(1)))
    assert same(read_checkpoint(run.checkpoint(30)), contents[-1])


def test_a_corrupt_checkpoint_is_moved_aside_when_its_step_is_saved_again(made):
    run, _ = made
    for number in (1, 2):
        spoil(run, 30)
        new = make_content(30, Random(number))
        save(run, new, attempt=7)
        assert same(newest_without_warning(run, RUN_ID), new)
    aside = ["step_00000030.damaged-7", "step_00000030.damaged-7-2"]
    assert [name for name in names(run) if "damaged" in name] == aside
    assert (run.checkpoints / aside[0] / "model.safetensors").read_bytes() == b"spoilt", "for an examination"
    assert checkpoint_steps(run) == [30, 20, 10], "it counts as none"


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path):
    """A kill at every third call; `make soak` kills at each."""
    held, kills = save_kills(tmp_path, SEED, 40, every=3)
    assert held == kills >= 40, f"seed {SEED}; the cases are printed"


def test_a_disk_full_at_any_byte_loses_nothing_and_leaves_no_temporary_file(tmp_path):
    assert full_disks(tmp_path, SEED, 60) == (60, 60), f"seed {SEED}; the cases are printed"


def test_every_corruption_is_detected_and_the_previous_checkpoint_is_used(tmp_path):
    assert corruptions(tmp_path, SEED, 500) == (500, 500), f"seed {SEED}; the cases are printed"


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_corruption_is_reported_with_its_file_in_one_line(made, name):
    run, _ = made
    path = run.checkpoint(30)
    assert find_corruption(path, RUN_ID) is None
    spoil(run, 30, name)
    assert find_corruption(path).startswith(f"{path / name}: ")
    (path / name).unlink()
    assert find_corruption(path) == f"{path / name}: No such file or directory"


def test_a_checkpoint_of_another_run_or_step_is_reported(made):
    run, _ = made
    assert "belongs to another run (5eed5eed5eed5eed, this is abc)" in find_corruption(run.checkpoint(30), "abc")
    run.checkpoint(20).rename(run.checkpoint(40))
    assert find_corruption(run.checkpoint(40)) == f"{run.checkpoint(40) / 'state.json'} is of step 20"


def test_a_checkpoint_of_a_later_format_is_refused(made, monkeypatch):
    run, _ = made
    monkeypatch.setattr(checkpoint_dir, "FORMAT", 3)
    save(run, make_content(40, Random(1)))
    monkeypatch.undo()
    assert "format 3, expected 2: written by another version" in find_corruption(run.checkpoint(40))


def test_each_corrupt_checkpoint_is_named_and_the_next_valid_one_is_used(made):
    run, contents = made
    spoil(run, 30)
    spoil(run, 20, "state.json")
    with log_lines() as lines:
        assert same(newest_valid(run, RUN_ID), contents[0])
    assert [str(run.checkpoint(step)) in line for step, line in zip((30, 20), lines, strict=True)] == [True, True]
    assert all(line.startswith("WARNING: damaged checkpoint: ") for line in lines)


def test_all_checkpoints_corrupt_is_an_error_and_no_new_start(made):
    run, _ = made
    for step in (10, 20, 30):
        spoil(run, step)
    with pytest.raises(
        CheckpointError, match=r"all 3 checkpoints in .* are damaged .*--checkpoint\.resume new"
    ) as caught:
        newest_valid(run, RUN_ID)
    assert caught.value.exit_code == 65
    assert str(run.checkpoint(30)) in str(caught.value)
