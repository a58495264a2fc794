"""Pruning: old checkpoints are removed, valid ones kept, links not followed, temporary directories removed."""

from random import Random

import pytest

from fnet_dist.checkpoint.storage import (
    checkpoint_steps,
    prune,
    read_checkpoint,
    remove_temp_dirs,
    write_best,
)
from fnet_dist.errors import LostOwnershipError
from tests.helpers.checkpoint_faults import (
    KEEP,
    RUN_ID,
    good_steps,
    hidden,
    make_content,
    make_run,
    names,
    newest_without_warning,
    same,
    save,
    spoil,
)

SEED = 20261124


@pytest.mark.parametrize(
    ("steps", "damaged", "kept"),
    [
        ((10,), (), [10]),
        ((10, 20), (), [20, 10]),
        ((10, 20, 30, 40), (), [40, 30]),
        ((10, 20, 30, 40), (40,), [40, 30, 20]),
        ((10, 20, 30, 40), (20, 30), [40, 30, 20, 10]),
        ((10, 20, 30, 40), (10, 20), [40, 30]),
        ((10, 20, 30), (10, 20, 30), [30, 20, 10]),
    ],
)
def test_pruning_keeps_two_valid_checkpoints_and_all_newer_ones(tmp_path, steps, damaged, kept):
    run, _ = make_run(tmp_path / "r", Random(SEED), steps)
    for step in damaged:
        spoil(run, step)
    prune(run, RUN_ID, KEEP, lambda: None)
    assert checkpoint_steps(run) == kept
    assert good_steps(run) == [step for step in kept if step not in damaged]
    assert hidden(run) == []


@pytest.mark.parametrize(("best", "kept"), [(10, [40, 30, 10]), (30, [40, 30]), (40, [40, 30]), (5, [40, 30])])
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, best, kept):
    run, _ = make_run(tmp_path / "r", Random(SEED), (10, 20, 30, 40))
    write_best(run, best, "loss", 0.5)
    prune(run, RUN_ID, KEEP, lambda: None)
    assert checkpoint_steps(run) == kept


def test_checkpoints_of_another_run_do_not_count_as_valid(made):
    run, _ = made
    save(run, make_content(40, Random(1), run_id="other"))
    prune(run, RUN_ID, KEEP, lambda: None)
    assert checkpoint_steps(run) == [40, 30, 20]


def test_pruning_keeps_the_given_number(made):
    run, _ = made
    prune(run, RUN_ID, 3, lambda: None)
    assert checkpoint_steps(run) == [30, 20, 10]


def test_pruning_checks_ownership_before_each_removal(made):
    run, _ = made

    def refuse():
        raise LostOwnershipError

    with pytest.raises(LostOwnershipError):
        prune(run, RUN_ID, KEEP, refuse)
    assert checkpoint_steps(run) == [30, 20, 10]


def test_pruning_follows_no_symbolic_link_and_keeps_other_files(made, tmp_path):
    run, _ = made
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (run.checkpoints / "step_00000001").symlink_to(outside)
    (run.checkpoint(10) / "inside").symlink_to(outside)
    (run.checkpoint(10) / "file").symlink_to(outside / "precious")
    (run.checkpoints / ".hidden").symlink_to(outside)
    (run.checkpoints / "step_00000005.damaged-1").mkdir()
    (run.checkpoints / "step_00000002").write_text("a file")
    (run.checkpoints / "notes").mkdir()
    prune(run, RUN_ID, KEEP, lambda: None)
    remove_temp_dirs(run)
    assert (outside / "precious").read_text() == "kept"
    assert names(run) == [
        ".hidden",
        "notes",
        "step_00000001",
        "step_00000002",
        "step_00000005.damaged-1",
        "step_00000020",
        "step_00000030",
    ]


def test_a_symbolic_link_is_no_checkpoint_and_is_moved_aside(made, tmp_path):
    run, contents = made
    elsewhere, _ = make_run(tmp_path / "elsewhere", Random(1), (40,))
    run.checkpoint(40).symlink_to(elsewhere.checkpoint(40))
    assert same(newest_without_warning(run, RUN_ID), contents[-1])
    new = make_content(40, Random(2))
    save(run, new)
    assert same(newest_without_warning(run, RUN_ID), new)
    assert not same(read_checkpoint(elsewhere.checkpoint(40)), new)


def test_remove_temp_dirs_removes_only_temporary_directories(made):
    run, _ = made
    for name in (".step_00000040-abc", ".pruned-step_00000005"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "model.safetensors").write_text("half")
    remove_temp_dirs(run)
    assert names(run) == ["step_00000010", "step_00000020", "step_00000030"]
