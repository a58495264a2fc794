"""The comparison of two runs finds each difference, and none in a copy."""

import json
import shutil
from random import Random

import numpy as np
import pytest
from safetensors.numpy import save

from fnet_dist.checkpoint.storage import CheckpointBytes, save_checkpoint, write_best
from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.verification.compare_runs import gaps, run_differences
from tests.helpers.made_run import Made, make_run


def weights(seed=0, **changes):
    random = np.random.default_rng(seed)
    tensors = {name: random.random(shape, dtype=np.float32) for name, shape in (("w", (20, 30)), ("b", (20,)))}
    return save(tensors | changes)


def commit(run, step, model=None, optimizer=None, **values):
    given = {"run_id": run.name, "step": step, "epoch": 2, "samples": 64 * step, "epoch_seconds": 1.0} | values
    content = CheckpointBytes(given, model or weights(step), optimizer or weights(step + 1))
    save_checkpoint(run, content, 1, lambda: None)


@pytest.fixture
def one(tmp_path):
    run = make_run(tmp_path, Made(name="one", steps_per_epoch=20, epochs=2))
    run.model.write_bytes(weights())
    commit(run, 20)
    commit(run, 40)
    return run


@pytest.fixture
def other(one, tmp_path):
    """A copy that may differ where runs may: name, times, attempts, and the checkpoint before the last."""
    run = RunDir(tmp_path / "other")
    shutil.copytree(one.path, run.path, ignore=shutil.ignore_patterns("checkpoints"))
    commit(run, 30)
    commit(run, 40, epoch_seconds=9.0)
    lines = rows(run)
    for line in lines:
        line["time"] = line["seconds"] = line["samples_per_second"] = 7.0
        line["attempt"] = 1 + (line.get("step", line.get("last_step")) > 30)
    rewrite(run, lines)
    return run


def rows(run):
    return [json.loads(row) for row in run.metrics_log.read_text().splitlines()]


def rewrite(run, lines):
    run.metrics_log.unlink()
    metrics_log.append(run.metrics_log, lines)


def index_of(lines, kind, step):
    return next(number for number, line in enumerate(lines) if (line["kind"], line.get("step")) == (kind, step))


def test_a_copy_has_no_difference_and_no_gap(one, other):
    assert run_differences(one, one) == run_differences(one, other) == run_differences(other, one) == []
    assert gaps(one) == gaps(other) == []


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [(0, 0), (19, 29), (7, 11)])
def test_one_weight_whose_last_bit_differs_is_found(one, other, index):
    changed = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    changed[index] = np.nextafter(changed[index], np.float32(2))
    other.model.write_bytes(weights(w=changed))
    assert run_differences(one, other) == ["other: model.safetensors: w differs in 1 of 600 numbers"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"w": np.zeros((30, 20), np.float32)}, "w is float32 (30, 20), expected float32 (20, 30)"),
        ({"w": np.zeros((20, 30), np.int32)}, "w is int32 (20, 30), expected float32 (20, 30)"),
        ({"extra": np.zeros(1, np.float32)}, "extra is in one of them only"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_weights_of_another_shape_type_or_name_are_found(one, other, changes, found):
    other.model.write_bytes(weights(**changes))
    assert run_differences(one, other) == [f"other: model.safetensors: {found}"]


def test_a_key_that_only_one_line_has_is_found(one, other):
    lines = rows(other)
    lines[index_of(lines, "train", 17)]["extra"] = 1
    rewrite(other, lines)
    assert run_differences(one, other) == ["other: train line of step 17: extra 1, expected None"]
    assert run_differences(other, one) == ["one: train line of step 17: extra None, expected 1"]


def test_minus_zero_is_not_zero(one, other):
    for run, zero in ((one, 0.0), (other, -0.0)):
        run.model.write_bytes(weights(b=np.full(20, zero, np.float32)))
    assert run_differences(one, other) == ["other: model.safetensors: b differs in 20 of 20 numbers"]


def test_missing_weights_are_found_on_either_side(one, other):
    other.model.unlink()
    assert run_differences(one, other) == [f"other: {other.model} is missing"]
    assert run_differences(other, one) == [f"one: {other.model} is missing"]


# The metrics log ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step", "key", "value"),
    [
        ("train", 1, "loss", 0.5),
        ("train", 40, "samples", 1),
        ("train", 23, "loss_per_rank", [0.5, 0.5]),
        ("train", 7, "grad_norm", 0.0),
        ("train", 7, "lr", 0.1),
        ("epoch", 20, "train_loss", 0.5),
        ("epoch", 40, "train_loss", 0.5),
        ("eval", 20, "loss", 0.5),
        ("eval", 40, "metrics", {"accuracy": 0.1}),
        ("eval", 40, "count", 1),
    ],
)
def test_one_changed_value_of_one_line_is_found(one, other, kind, step, key, value):
    lines = rows(other)
    number = index_of(lines, kind, step)
    before = lines[number][key]
    lines[number][key] = value
    rewrite(other, lines)
    assert run_differences(one, other) == [f"other: {kind} line of step {step}: {key} {value}, expected {before}"]


def test_hashes_are_compared_at_the_steps_that_both_runs_have(one, other):
    """A fast run hashes its weights less often."""
    lines = {1: "a", 10: "b", 20: "c"}

    def add_hashes(run, steps):
        hashes = [{"kind": "hash", "step": step, "weights": {"w": lines[step]}, "attempt": 2} for step in steps]
        rewrite(run, [*rows(run), *hashes])

    add_hashes(one, [1, 10, 20])
    add_hashes(other, [10])
    assert run_differences(one, other) == run_differences(other, one) == []
    lines[20] = "damaged"
    add_hashes(other, [20])
    assert run_differences(one, other) == ["other: hash line of step 20: weights {'w': 'damaged'}, expected {'w': 'c'}"]


@pytest.mark.parametrize(
    ("kind", "step"),
    [("train", 1), ("train", 17), ("train", 40), ("eval", 20), ("eval", 40), ("epoch", 20), ("epoch", 40)],
)
def test_a_missing_line_is_found_from_either_side(one, other, kind, step):
    lines = rows(other)
    del lines[index_of(lines, kind, step)]
    rewrite(other, lines)
    assert len(run_differences(one, other)) == len(run_differences(other, one)) == 1


def test_a_missing_step_is_a_gap(one):
    lines = rows(one)
    del lines[index_of(lines, "train", 17)]
    rewrite(one, lines)
    assert gaps(one) == ["one: the metrics log has step 18 where 17 was expected"]


def test_steps_before_the_first_recorded_one_are_no_gap(one):
    rewrite(one, [line for line in rows(one) if line.get("step", 99) > 10])
    assert gaps(one) == []


def test_a_step_trained_twice_under_the_next_number_is_found(one, other):
    """A wrong position after a resume would give this: each number once, but one step trained twice."""
    lines = rows(other)
    at = index_of(lines, "train", 17)
    lines[at + 1] = {**lines[at], "step": 18}
    rewrite(other, lines)
    assert run_differences(one, other)[0].startswith("other: train line of step 18: samples ")


def test_an_extra_line_is_found(one, other):
    lines = rows(other)
    lines.append({**lines[index_of(lines, "train", 40)], "step": 41})
    rewrite(other, lines)
    assert run_differences(one, other) == ["other: 41 train lines in the metrics log, 40 expected"]


def test_lines_that_readers_skip_are_no_difference(one, other):
    """A repeated step, and a line that an old owner wrote after its successor had begun."""
    lines = rows(other)
    last = lines[index_of(lines, "train", 40)]
    lines += [{**last, "loss": 99.0}, {**last, "step": 41, "attempt": 1}]
    rewrite(other, lines)
    assert run_differences(one, other) == []


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_different_newest_checkpoint_is_found(one, other):
    commit(other, 50)
    assert run_differences(one, other) == ["other: the newest checkpoint is of step [50], expected [40]"]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"model": weights(7)}, "checkpoint's model: b differs in 20 of 20 numbers"),
        ({"optimizer": weights(7)}, "checkpoint's optimizer: b differs in 20 of 20 numbers"),
        ({"epoch": 3}, "checkpoint: epoch 3, expected 2"),
        ({"samples": 1}, "checkpoint: samples 1, expected 2560"),
    ],
    ids=["model", "optimizer", "epoch", "samples"],
)
def test_each_difference_in_the_newest_checkpoint_is_found(one, other, changed, found):
    shutil.rmtree(other.checkpoint(40))
    commit(other, 40, **changed)
    assert run_differences(one, other) == [f"other: {found}"]


def test_a_checkpoint_saved_before_its_evaluation_was_counted_is_no_difference(one, other):
    before = {"evaluated_step": 20, "best_step": 20, "best_value": 0.5, "not_better": 1}
    after = {"evaluated_step": 40, "best_step": 40, "best_value": 0.9, "not_better": 0}
    for run, values in ((one, before), (other, after)):
        shutil.rmtree(run.checkpoint(40))
        commit(run, 40, **values)
    assert run_differences(one, other) == run_differences(other, one) == []


def test_another_best_evaluation_is_a_difference(one, other):
    write_best(one, 40, "accuracy", 0.84)
    assert run_differences(one, other) == ["other: best.json is None"]
    write_best(other, 40, "accuracy", 0.84)
    assert run_differences(one, other) == []
    write_best(other, 20, "accuracy", 0.84)
    assert run_differences(one, other) == [f"other: best.json is {read_json(other.best)}"]


def test_a_damaged_checkpoint_is_a_difference(one, other):
    (other.checkpoint(40) / "model.safetensors").write_bytes(b"damaged")
    (line,) = run_differences(one, other)
    assert "sha256" in line


def test_a_flipped_bit_anywhere_in_the_weights_is_found(one, other):
    seed = 20261124
    random = Random(seed)
    whole = one.model.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        at = random.randrange(len(data))
        data[at] ^= 1 << random.randrange(8)
        other.model.write_bytes(data)
        assert run_differences(one, other), f"byte {at}, seed {seed}"
