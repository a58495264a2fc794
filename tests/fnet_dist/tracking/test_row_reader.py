"""RowReader: an attempt's rows are those of the whole log, though it reads only what follows the saved position."""

import json
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.run import metrics_log
from fnet_dist.run.run_dir import RunDir, open_run, run_dir_of, write_manifest
from fnet_dist.tracking import row_reader
from fnet_dist.tracking.row_reader import RowReader
from tests.helpers.config import FashionConfig
from tests.helpers.made_run import train_line

EPOCH = 6  # steps


def lines() -> list[Any]:
    """Return the lines of two epochs in two attempts; the second trains step 8 again."""
    made: list[Any] = []
    for attempt, steps in ((1, range(1, 9)), (2, range(8, 2 * EPOCH + 1))):
        for step in steps:
            made.append(train_line(step, attempt))
            if step % EPOCH == 0:
                shared = {"epoch": step // EPOCH, "step": step, "attempt": attempt}
                made.append({"kind": "eval", **shared, "loss": 1.0, "metrics": {"accuracy": 1 / step}})
                made.append({"kind": "epoch", **shared, "train_loss": 1.0})
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = FashionConfig.model_validate({"run": {"name": "r", "root": str(tmp_path), "epochs": 2}})
    run_dir_of(made).path.mkdir()
    run = open_run(made)
    write_manifest(run, {"dataset": {"train_count": 64 * EPOCH}, "metrics": {"accuracy": "higher"}})
    run.wandb.mkdir()
    return run


def read(run: RunDir, rows_there: int) -> tuple[list[Any], RowReader]:
    """Return the rows that are not there yet, as follow() would send them, and the reader."""
    reader, rows = RowReader(run, 2, rows_there), []
    for part in (reader.new(), reader.last()):
        rows += [row for row in part if reader.number > rows_there]
    return rows, reader


def hide(run: RunDir, before: int) -> None:
    """Make the log's first bytes, up to the line that ends at `before`, unreadable."""
    content = run.metrics_log.read_bytes()
    run.metrics_log.write_bytes(b"x" * (before - 1) + b"\n" + content[before:])


def test_after_any_line_the_next_attempt_goes_on_without_the_lines_before(run: RunDir) -> None:
    metrics_log.append(run.metrics_log, lines())
    expected, whole = read(run, 0)
    for count in range(1, len(lines())):
        run.metrics_log.unlink()
        run.tracking_position.unlink(missing_ok=True)
        metrics_log.append(run.metrics_log, lines()[:count])
        first, reader = read(run, 0)
        reader.save()
        hide(run, run.metrics_log.stat().st_size)
        metrics_log.append(run.metrics_log, lines()[count:])
        rest, reader = read(run, len(first))
        assert [*first, *rest] == expected, count
        assert reader.builder.state == whole.builder.state, count


def test_rows_that_w_and_b_has_lost_are_read_again(run: RunDir) -> None:
    metrics_log.append(run.metrics_log, lines()[:8])
    rows, reader = read(run, 0)
    reader.save()
    assert len(rows) == 3
    assert read(run, 1)[0] == rows[1:]


def test_a_position_is_saved_only_when_w_and_b_has_had_time_for_its_rows(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(row_reader.time, "monotonic", lambda: clock[0])
    reader, saved = RowReader(run, 2, 0), []
    for number in range(5):
        metrics_log.append(run.metrics_log, lines()[2 * number : 2 * number + 2])
        clock[0] += 40
        assert len([*reader.new()]) in (0, 1)
        saved.append(json.loads(run.tracking_position.read_text())["number"] if run.tracking_position.exists() else -1)
    assert saved == [-1, 0, 0, 1, 1], "after 80 s that of the start, after 160 s that after 80 s"


@pytest.mark.parametrize(
    "change", ["", "{", "[]", {"number": "1"}, {"log": {"offset": 5}}, {"conditions": {}}, {"rows": {"x": 1}}]
)
def test_a_position_that_does_not_fit_counts_for_nothing(run: RunDir, change: Any) -> None:
    metrics_log.append(run.metrics_log, lines())
    expected, reader = read(run, 0)
    reader.save()
    if isinstance(change, dict):
        change = json.dumps(json.loads(run.tracking_position.read_text()) | change)
    run.tracking_position.write_text(change)
    assert read(run, 0)[0] == expected
    assert read(run, 2)[0] == expected[2:]
