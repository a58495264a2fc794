"""The ledger: its keys are a contract, and a step counts once whatever happened to who wrote it."""

import json
import os

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import EpochLine, TrainLine, WindowLine

# As the contract lists them (fnet_dist/README.md); readers and W&B's rows rely on each.
KEYS = {
    TrainLine: "kind step epoch samples loss loss_per_rank loss_min loss_max worst_rank lr grad_norm time attempt",
    WindowLine: "kind first_step last_step time samples_per_second step_ms slowest_rank max_over_median "
    "max_memory_gib world_size attempt",
    EpochLine: "kind epoch step train_loss test_loss test_accuracy test_correct test_count seconds "
    "samples_per_second attempt",
}


def train(step, attempt=1, loss=1.0):
    return {"kind": "train", "step": step, "attempt": attempt, "loss": loss}


def epoch(step, attempt=1):
    return {"kind": "epoch", "step": step, "attempt": attempt}


def window(last_step, attempt=1):
    return {"kind": "window", "last_step": last_step, "attempt": attempt}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger"


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_the_keys_of_each_kind_of_line_are_these(kind):
    assert [*kind.__annotations__] == KEYS[kind].split()
    assert kind.__required_keys__ == {*KEYS[kind].split()}


def test_lines_are_appended_as_json_one_a_row(path):
    metrics_log.append(path, [train(1), train(2)])
    metrics_log.append(path, [])
    metrics_log.append(path, [epoch(2)])
    assert path.read_text().endswith("\n")
    assert [json.loads(row) for row in path.read_text().splitlines()] == [train(1), train(2), epoch(2)]
    assert list(metrics_log.read(path)) == [train(1), train(2), epoch(2)]


def test_where_nothing_is_written_yet_nothing_is_read(path):
    assert list(metrics_log.read(path)) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_of_lines_that_hold_no_number_none_is_written(path, loss):
    metrics_log.append(path, [train(1)])
    with pytest.raises(ValueError, match="JSON"):
        metrics_log.append(path, [train(2), train(3, loss=loss)])
    assert list(metrics_log.read(path)) == [train(1)]


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(path):
    metrics_log.append(path, [train(1), train(2)])
    whole = path.read_bytes()
    first = len(whole) // 2
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert list(metrics_log.read(path)) == [train(1)], whole[:end]


def test_replayed_steps_keep_the_line_first_written(path):
    metrics_log.append(path, [train(1), train(2), train(3, loss=0.5), epoch(3)])
    metrics_log.append(path, [train(2, 2), train(3, 2, loss=0.7), epoch(3, 2), train(4, 2), epoch(4, 2)])
    assert list(metrics_log.read(path)) == [
        train(1),
        train(2),
        train(3, loss=0.5),
        epoch(3),
        train(4, 2),
        epoch(4, 2),
    ]


def test_what_an_owner_writes_after_its_successor_began_is_ignored(path):
    metrics_log.append(path, [train(1), train(2, 2), train(3, 1), epoch(3, 1), window(3, 1), train(3, 2), train(4, 1)])
    assert list(metrics_log.read(path)) == [train(1), train(2, 2), train(3, 2)]


def test_lines_without_a_step_all_count(path):
    lines = [train(1), window(1), window(1), train(2), window(2)]
    metrics_log.append(path, lines)
    assert list(metrics_log.read(path)) == lines


# Whoever takes a run over ---------------------------------------------------------------------------------------------


def test_a_window_is_appended_in_one_write(path, monkeypatch):
    """A kill between two writes would leave part of a window; within one, it tears the last line at most."""
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(len(data)) or write(descriptor, data))
    metrics_log.append(path, [train(step) for step in range(1, 5000)])
    assert written == [path.stat().st_size]


def test_of_lines_that_a_full_disk_takes_in_part_none_stays(path, monkeypatch):
    metrics_log.append(path, [train(1)])
    write = os.write
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(OSError, match="No space left"):
            metrics_log.append(path, [train(2)])
    assert list(metrics_log.read(path)) == [train(1)]
    metrics_log.append(path, [train(2)])
    assert list(metrics_log.read(path)) == [train(1), train(2)]


def test_an_owner_that_is_stopped_within_a_line_takes_nothing_from_the_one_after_it(path, monkeypatch):
    """Its successor cut the torn line and went on; waking up, it finds a file that is not as it left it."""
    metrics_log.append(path, [train(1)])
    write = os.write

    def stopped(descriptor, data):
        write(descriptor, data[:7])
        with monkeypatch.context() as successor:
            successor.setattr(os, "write", write)
            metrics_log.truncate_torn_line(path)
            metrics_log.append(path, [train(2), train(3)])
        return 7

    with monkeypatch.context() as owner:
        owner.setattr(os, "write", stopped)
        with pytest.raises(OSError, match="No space left"):
            metrics_log.append(path, [train(2)])
    assert list(metrics_log.read(path)) == [train(1), train(2), train(3)]
    with path.open("ab") as file:
        file.write(b'"rest of a line"}\n')
    assert list(metrics_log.read(path)) == [train(1), train(2), train(3)]


def test_a_torn_last_line_is_cut_away_wherever_it_was_torn(path):
    """Else the new owner's first line would be the rest of it."""
    metrics_log.append(path, [train(1), train(2)])
    whole = path.read_bytes()
    first = len(whole) // 2
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        metrics_log.truncate_torn_line(path)
        assert path.read_bytes() == whole[:first], whole[:end]
        metrics_log.append(path, [train(2, 2)])
        assert list(metrics_log.read(path)) == [train(1), train(2, 2)]


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_071, 131_072, 200_000])
def test_a_torn_line_of_any_length_is_cut_away(path, size):
    for before in (b"", b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n'):
        path.write_bytes(before + b"x" * size)
        metrics_log.truncate_torn_line(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("lines", [[], [train(1)], [train(step) for step in range(1, 3000)]], ids=len)
def test_a_whole_ledger_is_left_as_it_is(path, lines):
    metrics_log.append(path, lines)
    before = path.read_bytes()
    metrics_log.truncate_torn_line(path)
    assert path.read_bytes() == before


def test_where_there_is_no_ledger_none_is_made(path):
    metrics_log.truncate_torn_line(path)
    assert not path.exists()


def test_the_last_step_of_each_kind_is_that_of_the_lines_that_count(path):
    assert metrics_log.last_steps(path) == {"train": 0, "epoch": 0}
    metrics_log.append(path, [train(1), train(2), window(2)])
    assert metrics_log.last_steps(path) == {"train": 2, "epoch": 0}
    metrics_log.append(path, [epoch(2), train(3, 2), train(2, 2), train(9, 1)])
    assert metrics_log.last_steps(path) == {"train": 3, "epoch": 2}


@pytest.mark.parametrize(
    ("total", "weight", "mean"),
    [(3.0, 2.0, 1.5), (0.0, 0.0, None), (float("nan"), 2.0, None), (float("inf"), 2.0, None)],
)
def test_a_mean_is_a_number_or_none(total, weight, mean):
    assert metrics_log.mean_or_none(total, weight) == mean
