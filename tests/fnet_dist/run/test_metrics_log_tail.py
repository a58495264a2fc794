"""Reading the end of a long metrics log: the last lines, the last window, the last accuracy."""

import json
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.metrics_log import MetricsReader
from jobs.monitor import run_state as standing
from tests.helpers.made_run import train_line


def long_log(path: Path, steps_per_epoch: int, epochs: list[int], window: int = 50) -> None:
    """Write an epoch of `steps_per_epoch` steps for each number in `epochs`, with that number / 100 as accuracy."""
    lines: list[Any] = []
    for step in range(1, steps_per_epoch * len(epochs) + 1):
        epoch = epochs[(step - 1) // steps_per_epoch]
        lines.append(train_line(step, 1, epoch=epoch))
        if step % window == 0:
            first = {"kind": "window", "first_step": step - window + 1, "last_step": step, "attempt": 1}
            lines.append(first | {"samples_per_second": 1.0, "slowest_rank": None, "max_over_median": None})
        if step % steps_per_epoch == 0:
            shared = {"epoch": epoch, "step": step, "attempt": 1}
            lines.append({"kind": "eval", **shared, "loss": 1.0, "metrics": {"accuracy": epoch / 100}})
            lines.append({"kind": "epoch", **shared, "train_loss": 1.0})
    metrics_log.append(path, lines)


class Counting(MetricsReader):
    """A reader that counts the lines it yields."""

    lines = 0

    def new(self) -> Any:
        for line in super().new():
            Counting.lines += 1
            yield line


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    Counting.lines = 0
    monkeypatch.setattr(metrics_log, "MetricsReader", Counting)
    return Counting


@pytest.mark.parametrize("block", [1, 100, 1000, 1 << 20])
def test_the_tail_equals_the_end_of_a_full_read_for_any_block_size(tmp_path: Path, block: int) -> None:
    path = tmp_path / "metrics"
    long_log(path, 30, [1, 2])
    everything = list(metrics_log.read(path))
    for wanted in (1, 7, len(everything), 1000):

        def enough(lines: list[dict[str, Any]], wanted: int = wanted) -> bool:
            return len(lines) >= wanted

        lines = metrics_log.tail(path, enough, block)
        assert len(lines) >= min(wanted, len(everything))
        assert lines == everything[-len(lines) :]


def test_the_tail_of_a_missing_log_is_empty_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    assert metrics_log.tail(path, bool) == []
    path.touch()
    assert metrics_log.tail(path, bool) == []
    metrics_log.append(path, [train_line(1, 1)])
    with path.open("a") as file:
        file.write(json.dumps(train_line(2, 1)))
    assert [line["step"] for line in metrics_log.tail(path, bool, block=1)] == [1]


def test_the_tail_reads_only_the_end(tmp_path: Path, counted: type[Counting]) -> None:
    path = tmp_path / "metrics"
    long_log(path, 10_000, [1])
    assert metrics_log.tail(path, bool, block=2000)[-1]["step"] == 10_000
    assert 0 < counted.lines < 20


@pytest.mark.parametrize(
    ("epochs", "accuracy"),
    [([1], 0.01), ([1, 2], 0.02), ([1, 2, 3], 0.03)],
)
def test_the_last_accuracy_is_found_without_reading_the_whole_log(
    tmp_path: Path, counted: type[Counting], epochs: list[int], accuracy: float
) -> None:
    path = tmp_path / "metrics"
    long_log(path, 5_000, epochs)
    figures = standing.read_figures(path)
    assert figures.evaluation is not None
    assert figures.evaluation["metrics"] == {"accuracy": accuracy}
    following: list[Any] = [
        train_line(5_000 * len(epochs) + step, 1, epoch=len(epochs) + 1) for step in range(1, 9_000)
    ]
    window: Any = {**figures.window, "first_step": following[-50]["step"]}
    metrics_log.append(path, [*following, window])
    counted.lines = 0
    figures = standing.read_figures(path)
    assert figures.evaluation is not None
    assert figures.evaluation["metrics"] == {"accuracy": accuracy}
    assert figures.train == following[-1]
    assert counted.lines < 4_000, "of 14,000 and more"


@pytest.mark.parametrize("epoch", [1, 4], ids=["first", "begun from another run's checkpoint"])
def test_the_first_epoch_has_no_accuracy_and_the_whole_log_is_not_read_for_that(
    tmp_path: Path, counted: type[Counting], epoch: int
) -> None:
    path = tmp_path / "metrics"
    long_log(path, 20_000, [epoch])
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:-2]))  # without the lines at the epoch's end
    counted.lines = 0
    figures = standing.read_figures(path)
    assert figures.evaluation is None
    assert figures.train is not None
    assert figures.train["step"] == 20_000
    assert counted.lines < 4_000


def test_the_loss_is_the_mean_over_a_window_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    lines: list[Any] = [train_line(step, 1, loss=float(step)) for step in range(1, 5001)]
    metrics_log.append(path, [*lines, {"kind": "window", "first_step": 1001, "last_step": 5000, "attempt": 1}])  # type: ignore[list-item]  # no step
    assert path.stat().st_size > 3 << 18
    assert standing.read_figures(path).loss == pytest.approx(3000.5)
