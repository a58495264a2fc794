"""A start reads the metrics log from the last checkpoint on, and finds what it would find from the first line on."""

import json

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.log_position import read_position, take_over_log, write_position
from fnet_dist.run.metrics_log import LogPosition
from fnet_dist.run.run_dir import RunDir
from tests.helpers.made_run import train_line


def epoch(step, attempt=1):
    return {"kind": "epoch", "step": step, "attempt": attempt}


@pytest.fixture
def run(tmp_path):
    """A run whose position was written after step 3 of attempt 2."""
    run = RunDir(tmp_path)
    lines = [train_line(1, 1), train_line(2, 1), epoch(2), train_line(3, 2)]
    metrics_log.append(run.metrics_log, lines)
    write_position(run, 2, {"train": 3, "eval": 0, "epoch": 2})
    return run


# Lines after the position: none; more steps; a line torn by a kill; a suspended owner that woke up; a replay.
AFTER = {
    "nothing": ([], b"", {"train": 3, "eval": 0, "epoch": 2}),
    "steps": ([train_line(4, 2), epoch(4, 2)], b"", {"train": 4, "eval": 0, "epoch": 4}),
    "a torn line": ([train_line(4, 2)], b'{"kind": "train", "step": 5', {"train": 4, "eval": 0, "epoch": 2}),
    "an earlier owner": ([train_line(9, 1), train_line(4, 2)], b"", {"train": 4, "eval": 0, "epoch": 2}),
    "only an earlier owner": ([train_line(9, 1)], b"", {"train": 3, "eval": 0, "epoch": 2}),
    "a replay": ([train_line(2, 3), train_line(3, 3), train_line(4, 3)], b"", {"train": 4, "eval": 0, "epoch": 2}),
}


@pytest.mark.parametrize("after", AFTER)
def test_only_what_follows_the_position_is_read_and_the_result_is_that_of_the_whole_log(run, after):
    lines, torn, expected = AFTER[after]
    before = run.metrics_log.stat().st_size
    metrics_log.append(run.metrics_log, lines)
    whole = run.metrics_log.read_bytes()
    run.metrics_log.write_bytes(b"x" * (before - 1) + b"\n" + whole[before:] + torn)  # nobody can read what is before
    assert take_over_log(run) == expected
    assert run.metrics_log.read_bytes()[before:] == whole[before:], "the torn line is removed, and nothing else"
    run.log_position.unlink()
    run.metrics_log.write_bytes(whole + torn)
    assert take_over_log(run) == expected
    assert run.metrics_log.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"offset": 1',
        json.dumps({"offset": 10_000, "attempt": 2, "last_steps": {"train": 3, "eval": 0, "epoch": 2}}),
        json.dumps({"offset": 5, "attempt": 2, "last_steps": {"train": 3, "eval": 0, "epoch": 2}}),
        json.dumps({"offset": 0, "attempt": 2, "last_steps": {"train": 3, "eval": 0, "epoch": 2}}),
        json.dumps({"offset": "1", "attempt": 2, "last_steps": {}}),
        json.dumps({"attempt": 2}),
    ],
)
def test_a_position_that_cannot_be_one_of_the_log_counts_for_nothing(run, text):
    run.log_position.write_text(text)
    assert read_position(run) == LogPosition()
    assert take_over_log(run) == {"train": 3, "eval": 0, "epoch": 2}


def test_a_new_run_has_neither(tmp_path):
    assert take_over_log(RunDir(tmp_path)) == {"train": 0, "eval": 0, "epoch": 0}
    write_position(RunDir(tmp_path), 1, {"train": 0, "eval": 0, "epoch": 0})
    assert [*tmp_path.iterdir()] == []
