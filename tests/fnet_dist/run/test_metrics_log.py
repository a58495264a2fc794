"""The metrics log: its keys are a contract, and readers see each step once after any interruption."""

import json
import os

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import EpochLine, EvalLine, PredictionsLine, TrainLine, WindowLine

# As the contract lists them (fnet_dist/README.md); readers and W&B's rows rely on each.
KEYS = {
    TrainLine: "kind step epoch samples loss loss_per_rank loss_min loss_max worst_rank lr grad_norm time attempt",
    WindowLine: "kind first_step last_step time samples_per_second step_ms slowest_rank max_over_median "
    "max_memory_gib world_size data_ms compute_ms exchange_ms gpu_percent gpu_memory_gib gpu_watts gpu_celsius attempt",
    EvalLine: "kind step epoch loss metrics count seconds attempt",
    EpochLine: "kind epoch step train_loss seconds samples_per_second attempt",
    PredictionsLine: "kind step epoch best_step time attempt",
}


def train(step, attempt=1, loss=1.0):
    return {"kind": "train", "step": step, "attempt": attempt, "loss": loss}


def epoch(step, attempt=1):
    return {"kind": "epoch", "step": step, "attempt": attempt}


def window(last_step, attempt=1):
    return {"kind": "window", "last_step": last_step, "attempt": attempt}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics"


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_each_kind_of_line_has_these_keys(kind):
    assert [*kind.__annotations__] == KEYS[kind].split()
    assert kind.__required_keys__ == {*KEYS[kind].split()}


def test_each_line_is_appended_as_one_row_of_json(path):
    metrics_log.append(path, [train(1), train(2)])
    metrics_log.append(path, [])
    metrics_log.append(path, [epoch(2)])
    assert path.read_text().endswith("\n")
    assert [json.loads(row) for row in path.read_text().splitlines()] == [train(1), train(2), epoch(2)]
    assert list(metrics_log.read(path)) == [train(1), train(2), epoch(2)]


def test_a_missing_log_reads_as_empty(path):
    assert list(metrics_log.read(path)) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_no_line_is_written_if_one_holds_nan_or_infinity(path, loss):
    metrics_log.append(path, [train(1)])
    with pytest.raises(ValueError, match="JSON"):
        metrics_log.append(path, [train(2), train(3, loss=loss)])
    assert list(metrics_log.read(path)) == [train(1)]


def test_readers_skip_a_torn_last_line(path):
    metrics_log.append(path, [train(1), train(2)])
    whole = path.read_bytes()
    first = len(whole) // 2
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert list(metrics_log.read(path)) == [train(1)], whole[:end]


def test_readers_keep_the_first_line_of_a_repeated_step(path):
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


def test_an_epoch_line_of_format_1_is_read_as_its_evaluation_and_the_epoch(path):
    shared = {"step": 4, "epoch": 1, "attempt": 2}
    training = {"train_loss": 0.5, "seconds": 1.5, "samples_per_second": 43.0}
    test = {"test_loss": 0.25, "test_accuracy": 0.75, "test_correct": 15, "test_count": 20}
    line = {"kind": "epoch", **shared, **training, **test}
    metrics_log.append(path, [train(4, 2), line, line])
    evaluation = {"kind": "eval", **shared, "loss": 0.25, "metrics": {"accuracy": 0.75}, "count": 20, "seconds": None}
    found = list(metrics_log.read(path))
    assert found == [train(4, 2), evaluation, {"kind": "epoch", **shared, **training}]
    assert [{*line} for line in found[1:]] == [{*EvalLine.__annotations__}, {*EpochLine.__annotations__}]
    assert metrics_log.last_steps(path) == {"train": 4, "eval": 4, "epoch": 4}


def test_readers_skip_lines_of_an_earlier_attempt_after_a_later_one_began(path):
    metrics_log.append(path, [train(1), train(2, 2), train(3, 1), epoch(3, 1), window(3, 1), train(3, 2), train(4, 1)])
    assert list(metrics_log.read(path)) == [train(1), train(2, 2), train(3, 2)]


def test_readers_keep_all_window_lines(path):
    lines = [train(1), window(1), window(1), train(2), window(2)]
    metrics_log.append(path, lines)
    assert list(metrics_log.read(path)) == lines


# The next owner -------------------------------------------------------------------------------------------------------


def test_a_window_is_appended_in_one_write(path, monkeypatch):
    """A kill between two writes would leave part of a window; within one, it tears the last line at most."""
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(len(data)) or write(descriptor, data))
    metrics_log.append(path, [train(step) for step in range(1, 5000)])
    assert written == [path.stat().st_size]


def test_a_partial_write_on_a_full_disk_is_undone(path, monkeypatch):
    metrics_log.append(path, [train(1)])
    write = os.write
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(OSError, match="No space left"):
            metrics_log.append(path, [train(2)])
    assert list(metrics_log.read(path)) == [train(1)]
    metrics_log.append(path, [train(2)])
    assert list(metrics_log.read(path)) == [train(1), train(2)]


def test_undoing_a_partial_write_never_removes_lines_of_a_new_owner(path, monkeypatch):
    """A new owner removed the torn line and appended; the old one wakes up and finds a changed file."""
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


def test_truncate_removes_a_torn_last_line(path):
    """Without that, the new owner's first line would join the torn one."""
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
def test_truncate_removes_a_torn_line_of_any_length(path, size):
    for before in (b"", b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n'):
        path.write_bytes(before + b"x" * size)
        metrics_log.truncate_torn_line(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("lines", [[], [train(1)], [train(step) for step in range(1, 3000)]], ids=len)
def test_truncate_leaves_complete_lines_unchanged(path, lines):
    metrics_log.append(path, lines)
    before = path.read_bytes()
    metrics_log.truncate_torn_line(path)
    assert path.read_bytes() == before


def test_truncate_does_not_create_a_missing_log(path):
    metrics_log.truncate_torn_line(path)
    assert not path.exists()


def test_last_steps_ignores_skipped_lines(path):
    assert metrics_log.last_steps(path) == {"train": 0, "eval": 0, "epoch": 0}
    metrics_log.append(path, [train(1), train(2), window(2)])
    assert metrics_log.last_steps(path) == {"train": 2, "eval": 0, "epoch": 0}
    metrics_log.append(path, [epoch(2), train(3, 2), train(2, 2), train(9, 1)])
    assert metrics_log.last_steps(path) == {"train": 3, "eval": 0, "epoch": 2}


@pytest.mark.parametrize(
    ("total", "weight", "mean"),
    [(3.0, 2.0, 1.5), (0.0, 0.0, None), (float("nan"), 2.0, None), (float("inf"), 2.0, None)],
)
def test_a_mean_is_finite_or_none(total, weight, mean):
    assert metrics_log.mean_or_none(total, weight) == mean
