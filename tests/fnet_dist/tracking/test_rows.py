"""The rows that are built from a metrics log, and their keys."""

import pytest

from fnet_dist.run.metrics_log import MAX_RANK_CURVES
from fnet_dist.tracking.rows import RowBuilder, build_row


def train(step, per_rank=(1.0, 2.0), **other):
    line = {"kind": "train", "step": step, "epoch": 1, "samples": 64 * step, "loss": 1.5, "lr": 0.1, "attempt": 1}
    return {**line, "loss_per_rank": list(per_rank), "grad_norm": None, "time": 7.0, **other}


def window(last_step, **other):
    line = {"kind": "window", "first_step": 1, "last_step": last_step, "samples_per_second": 10.0 * last_step}
    rest = {"step_ms": 2.0, "slowest_rank": None, "max_over_median": 1.1, "max_memory_gib": 0.4, "world_size": 2}
    return {**line, **rest, "attempt": 1, **other}


def evaluation(step, accuracy=0.8):
    return {"kind": "eval", "epoch": 1, "step": step, "loss": 0.5, "metrics": {"accuracy": accuracy}}


def epoch(step, accuracy=0.8):
    """Return the two lines at an epoch's end."""
    return [evaluation(step, accuracy), {"kind": "epoch", "epoch": 1, "step": step, "train_loss": 0.7}]


def rows_of(lines, every_steps=2):
    rows = RowBuilder(every_steps, "accuracy", {"accuracy": "higher"})
    given = [row for line in lines if (row := rows.add(line)) is not None]
    return given, rows


def test_a_row_holds_the_values_of_its_own_step():
    row = build_row(train(4, (1.0, 2.0), grad_norm=3.0))
    assert row == {
        "_timestamp": 7.0,
        "trainer/step": 4,
        "trainer/epoch": 1,
        "trainer/samples": 256,
        "trainer/attempt": 1,
        "trainer/world_size": 2,
        "train/loss": 1.5,
        "train/lr": 0.1,
        "train/grad_norm": 3.0,
        "loss/rank_0": 1.0,
        "loss/rank_1": 2.0,
        "loss/min": 1.0,
        "loss/max": 2.0,
    }


def test_what_was_not_measured_has_no_key():
    row = build_row(train(4, (1.0, None)), window(3))
    assert not {"train/grad_norm", "loss/rank_1", "skew/slowest_rank"} & {*row}
    assert (row["loss/min"], row["loss/max"], row["trainer/world_size"]) == (1.0, 1.0, 2)
    assert row["skew/max_over_median"] == 1.1


def test_every_nth_step_and_every_evaluated_step_has_one_row():
    lines = [train(1), train(2), train(3), window(3), *epoch(3), train(4), train(5), window(5)]
    given, rows = rows_of(lines)
    assert [row["trainer/step"] for row in given] == [2, 3, 4]
    assert [row.get("eval/accuracy") for row in given] == [None, 0.8, None]
    assert rows.pending_step == 5
    assert rows.pending_row() is None  # 5 is not on the grid


def test_speed_is_that_of_the_last_window_before_the_row_is_complete():
    lines = [train(1), train(2), window(2), train(3), train(4), train(5), train(6), window(6), *epoch(6)]
    given, _ = rows_of(lines)
    assert [row.get("perf/samples_per_second") for row in given] == [20, 20, 60]


def test_a_row_waits_for_its_evaluation_and_is_returned_once():
    given, rows = rows_of([train(1), train(2), window(2)])
    assert (given, rows.pending_step) == ([], 2)
    assert rows.add(evaluation(2)) is None
    assert rows.has_pending_evaluation
    row = rows.add(epoch(2)[1])
    assert row is not None
    assert (row["eval/loss"], row["train/epoch_loss"]) == (0.5, 0.7)
    assert rows.add(train(3)) is None
    assert rows.pending_row() is None


def test_the_last_step_has_a_row_when_no_line_follows():
    _, rows = rows_of([train(1), train(2), window(2)])
    row = rows.pending_row()
    assert row is not None
    assert (row["trainer/step"], row["perf/samples_per_second"]) == (2, 20)
    assert rows.pending_row() is None


def test_the_best_and_the_last_evaluation_are_kept():
    _, rows = rows_of([train(1), *epoch(1, 0.9), train(2), *epoch(2, None), train(3), *epoch(3, 0.7)])
    assert (rows.state.best["metrics"], rows.state.last_evaluation["metrics"]) == ({"accuracy": 0.9}, {"accuracy": 0.7})
    assert (rows.state.extremes, rows.state.last_epoch["step"]) == ({"accuracy": 0.9}, 3)


def test_an_evaluation_within_an_epoch_gives_its_step_a_row():
    given, rows = rows_of([train(1), evaluation(1), train(2), train(3), evaluation(3)])
    assert [(row["trainer/step"], row.get("eval/accuracy")) for row in given] == [(1, 0.8), (2, None)]
    assert rows.pending_row()["eval/loss"] == 0.5


@pytest.mark.parametrize("ranks", [MAX_RANK_CURVES, MAX_RANK_CURVES + 1, 1000])
def test_above_64_ranks_a_row_has_percentile_and_worst_rank_in_place_of_each_loss(ranks):
    per_rank = [float(rank % 7) for rank in range(ranks)]
    per_rank[3] = None
    per_rank[5] = 99.0
    row = build_row(train(2, per_rank))
    assert (row["loss/min"], row["loss/max"]) == (0.0, 99.0)
    columns = [key for key in row if key.startswith("loss/rank_")]
    if ranks <= MAX_RANK_CURVES:
        assert len(columns) == ranks - 1
        assert "loss/p95" not in row
    else:
        assert columns == []
        assert (row["loss/p95"], row["loss/worst_rank"]) == (6.0, 5)
