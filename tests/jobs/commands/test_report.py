"""Tests of `fnet report`: its pages, pictures and console output."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.text
import numpy as np
import pytest
from matplotlib.figure import Figure

from fnet_dist.errors import ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.commands import report
from jobs.report import compare, plots, prediction_plots, statistics
from jobs.report.run_data import DatasetLabel, read_run_data
from jobs.report.style import COLOURS
from tests.helpers.made_run import Made, make_run


def figures_of(run: RunDir) -> dict[str, Figure]:
    run_data = read_run_data(run)
    assert run_data.predictions is not None
    return {
        "loss": plots.draw_loss(run_data),
        "evaluation": plots.draw_evaluations(run_data),
        "throughput": plots.draw_throughput(run_data),
        "confusion": prediction_plots.draw_confusion(run_data, run_data.predictions),
        "images": prediction_plots.draw_images(run_data, run_data.predictions),
    }


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def report_of(run: RunDir) -> str:
    assert report.main([str(run.path)]) == 0
    return (run.report / "index.html").read_text(encoding="utf-8")


def outside(page: str) -> list[str]:
    """Return everything in a page that a browser would load from elsewhere."""
    page = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:", page)
    return re.findall(r"https?://|<script|<link|@import|url\(|src=\"(?!data:)", page)


def test_a_finished_run_gets_five_pictures_and_a_page_that_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, Made())
    page = report_of(run)
    names = {path.name for path in run.report.iterdir()}
    assert names == {"loss.png", "evaluation.png", "throughput.png", "confusion.png", "images.png", "index.html"}
    assert page.count("data:image/png;base64,") == 5
    assert outside(page) == []
    assert capsys.readouterr().out.splitlines()[-1] == str(run.report / "index.html")


def test_the_page_shows_how_the_run_was_made_and_how_it_ended(tmp_path: Path) -> None:
    page = report_of(make_run(tmp_path, Made(ranks=(2, 4))))
    for fact in (
        "<dt>data set</dt><dd>Fashion-MNIST: 60,000 training and 10,000 test samples</dd>",
        "<dt>epochs</dt><dd>3</dd>",
        "<dt>test loss</dt><dd>0.3833</dd>",
        "<dt>test accuracy</dt><dd>0.8566</dd>",
        "<dt>world size</dt><dd>2 → 4</dd>",
        "<dt>device</dt><dd>cpu</dd>",
        "<dt>end</dt><dd>finished at step 282 of epoch 3</dd>",
        "0123456789abcdef0123456789abcdef01234567, with changes not committed",
        "python 3.11.2, torch 2.11.0, fnet_dist 0.1.0",
        "<dt>global_batch_size</dt><dd>64</dd>",
    ):
        assert fact in page
    assert "synthetic" not in page


def test_the_page_shows_the_attempts_the_best_evaluation_and_where_the_time_goes(tmp_path: Path) -> None:
    first = claim_attempt(RunDir(tmp_path / "r"), world_size=2, nodes="node[0-1]")
    run = make_run(tmp_path, Made(name="r", finished=False))
    spread = {"min": 1.0, "median": 1.0, "max": 1.5, "max_rank": 1, "by_rank": [1.0, 1.5]}
    window = {"kind": "window", "first_step": 283, "last_step": 290, "time": 1.0, "samples_per_second": 1000.0}
    window |= {"step_ms": 2.0, "slowest_rank": None, "max_over_median": None, "max_memory_gib": 1.0, "world_size": 2}
    line: Any = window | {"data_ms": spread, "compute_ms": spread, "exchange_ms": spread, "attempt": 2}
    end_attempt(first, "signal_usr2", 282, 75)
    claim_attempt(run, world_size=2)
    metrics_log.append(run.metrics_log, [line])
    page = report_of(run)
    assert "<dt>best</dt><dd>accuracy 0.8566 at step 282 of epoch 3</dd>" in page
    assert "<dd>input-bound: 75 % of the step waits for data, worst on rank 1</dd>" in page
    for cells in (
        '<td class="text">signal_usr2</td><td>1</td><td>282</td>',
        '<td>2</td><td class="text">node[0-1]</td>',
        '<td class="text">not ended</td><td>283</td><td>290</td><td>1,000</td>',
    ):
        assert cells in page


def test_samples_per_second_is_total_samples_over_total_seconds(tmp_path: Path) -> None:
    run = make_run(tmp_path, Made(steps=0, finished=False))
    window: dict[str, Any] = {"kind": "window", "time": 1.0, "attempt": 1, "slowest_rank": None, "max_over_median": 1.0}
    slow: Any = window | {"first_step": 1, "last_step": 100, "samples_per_second": 1000.0, "step_ms": 64.0}
    fast: Any = window | {"first_step": 101, "last_step": 200, "samples_per_second": 4000.0, "step_ms": 16.0}
    metrics_log.append(run.metrics_log, [slow, fast])
    assert statistics.run_stats(read_run_data(run))["samples/s"] == pytest.approx(200 * 64 / (6.4 + 1.6))


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ([], "–"),
        ([(None, None)] * 2, "–"),
        ([(None, 1.02), (None, 1.3)], "none"),
        (
            [(None, 1.1), (1, 1.7), (1, 1.8), (1, 1.9), (0, 3.0)],
            "rank 1 in 3 of 5 windows, 1.8 × the median rank's time",
        ),
    ],
)
def test_the_summary_names_the_rank_that_was_slowest_most_often(
    windows: list[tuple[int | None, float | None]], words: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, Made(steps=0, finished=False))
    common: Any = {"kind": "window", "time": 1.0, "attempt": 1, "samples_per_second": 1.0, "step_ms": 1.0}
    for step, (rank, ratio) in enumerate(windows, 1):
        skew = {"first_step": step, "last_step": step, "slowest_rank": rank, "max_over_median": ratio}
        metrics_log.append(run.metrics_log, [common | skew])
    run_data = read_run_data(run)
    assert statistics.summarize(run_data)["slowest rank"] == words


def test_per_class_results_match_a_matrix_counted_by_hand() -> None:
    true, predicted = np.array([0, 0, 0, 0, 1, 1, -1, -100]), np.array([0, 0, 0, 1, 1, 0, 2, 0])  # two are ignored
    counts = statistics.confusion(true, predicted, 3)
    assert counts.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    first, second, never = statistics.per_class(counts, ("a", "b", "c"))
    assert (first.precision, first.recall, first.count, first.taken_for) == (0.75, 0.75, 4, "b")
    assert (second.precision, second.recall, second.count, second.taken_for) == (0.5, 0.5, 2, "a")
    assert (never.precision, never.recall, never.count, never.taken_for) == (None, None, 0, None)


def test_bins_have_mean_lowest_and_highest_value_and_ignore_missing_ranks() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [5.0, 2.0], [6.0, np.nan]])
    binned = plots.bin_steps(np.array([1, 2, 3, 4]), values, 2)
    assert binned.step.tolist() == [1.5, 3.5]
    np.testing.assert_array_equal(binned.mean, [[2.0, np.nan], [5.5, 2.0]])
    np.testing.assert_array_equal(binned.low, [[1.0, np.nan], [5.0, 2.0]])
    np.testing.assert_array_equal(binned.high, [[3.0, np.nan], [6.0, 2.0]])


def test_every_picture_names_its_data_set(tmp_path: Path) -> None:
    for dataset, words in (("synthetic", "synthetic data, not Fashion-MNIST"), ("fashion-mnist", "Fashion-MNIST")):
        run = make_run(tmp_path, Made(name=dataset, dataset=dataset))
        for figure in figures_of(run).values():
            assert f"{words} · {dataset}" in texts(figure)


def test_the_page_of_a_run_on_synthetic_data_has_a_notice(tmp_path: Path) -> None:
    page = report_of(make_run(tmp_path, Made(dataset="synthetic", steps=5, finished=False)))
    assert '<p class="notice">synthetic data, not Fashion-MNIST</p>' in page


def test_wrong_predictions_are_marked_by_a_cross_and_the_true_class_not_by_colour_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, Made())
    shown = read_run_data(run).predictions
    assert shown is not None
    wrong = int((shown.true != shown.predicted)[shown.thumbnail_index].sum())
    said = texts(prediction_plots.draw_images(read_run_data(run), shown))
    assert len([text for text in said if text.startswith("✗")]) == wrong > 0
    assert len([text for text in said if text.startswith("✓")]) == 40 - wrong
    assert len([text for text in said if text.startswith("is: ")]) == wrong


@pytest.mark.parametrize(
    ("made", "pictures"),
    [
        (Made(steps=0, finished=False), 0),
        (Made(steps=1, finished=False), 2),
        (Made(steps=60, finished=False, empty_last_rank=True), 2),
        (Made(epochs=1), 5),
        (Made(ranks=(64,), epochs=2, finished=False), 3),
        (Made(ranks=(8, 3), epochs=12, finished=False), 3),
        (
            Made(
                dataset="<b>mine", ranks=(1,), classes=("cat", "<b>$dog$</b>", "狗"), images=30, thumbnail=(32, 32, 3)
            ),
            5,
        ),
        (Made(classes=tuple(f"kind {i}" for i in range(1000)), thumbnail=(32, 32, 1)), 5),
    ],
    ids=["nothing yet", "one step", "unfinished", "one epoch", "64 ranks", "resized", "three classes", "1000 classes"],
)
def test_the_page_of_any_run_has_the_pictures_that_it_has_data_for(tmp_path: Path, made: Made, pictures: int) -> None:
    page = report_of(make_run(tmp_path, made))
    assert page.count("data:image/png;base64,") == pictures
    assert ("not ended: last step recorded" in page) == (not made.finished)
    assert "<b>" not in page


def test_a_class_name_is_drawn_literally_or_as_a_number_if_the_font_lacks_a_character(tmp_path: Path) -> None:
    run = make_run(tmp_path, Made(classes=("$dog$", "狗", "a name that is far too long")))
    run_data = read_run_data(run)
    assert run_data.predictions is not None
    figure = prediction_plots.draw_confusion(run_data, run_data.predictions)
    assert {"$dog$", "class 1", "a name that is …"} <= set(texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(matplotlib.text.Text) if text.get_text() == "$dog$")


def test_a_rank_that_is_absent_or_has_no_samples_has_no_loss(tmp_path: Path) -> None:
    run_data = read_run_data(make_run(tmp_path, Made(ranks=(3, 1), steps=4, finished=False)))
    assert np.isfinite(run_data.steps["rank_loss"]).sum(axis=1).tolist() == [3, 3, 1, 1]
    empty = read_run_data(make_run(tmp_path, Made(name="empty", steps=2, finished=False, empty_last_rank=True)))
    assert np.isfinite(empty.steps["rank_loss"]).tolist() == [[True, False], [True, False]]


def test_above_16_ranks_a_band_replaces_the_lines(tmp_path: Path) -> None:
    lines = {}
    for ranks in (16, 17):
        run_data = read_run_data(make_run(tmp_path, Made(name=str(ranks), ranks=(ranks,), steps=30, finished=False)))
        lines[ranks] = [line for line in plots.draw_loss(run_data).axes[0].lines if np.size(line.get_xdata()) == 30]
    assert len(lines[16]) == 16 + 1
    assert len(lines[17]) == 1 + 1


def test_a_comparison_shows_differing_settings_and_marks_the_best_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, Made(name=f"lr-{lr}", lr=lr)) for lr in (0.003, 0.01)]
    assert report.main([str(run.path) for run in runs]) == 0
    page = (runs[0].report / "compare.html").read_text(encoding="utf-8")
    assert "<th>optim.lr</th>" in page
    assert "data.global_batch_size" not in page
    assert '<td class="best">0.8566 ★</td>' in page
    assert "<td>0.8216</td>" in page
    assert outside(page) == []
    assert page.count("data:image/png;base64,") == 2
    assert capsys.readouterr().out.splitlines()[-1] == str(runs[0].report / "compare.html")


def test_a_run_without_steps_keeps_its_place_among_the_colours_of_a_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, Made(name="new", steps=0, finished=False)), make_run(tmp_path, Made(name="done"))]
    assert report.main([str(run.path) for run in runs]) == 0
    runs_data = [read_run_data(run) for run in runs]
    dataset = DatasetLabel("Fashion-MNIST", is_synthetic=False)
    for draw in (plots.compare_loss, plots.compare_metric):
        figure = draw(runs_data, ["new", "done"], dataset)
        assert [text for text in texts(figure) if text in ("new", "done")] == ["done"]
        assert figure.axes[0].lines[1].get_color() == COLOURS[1]


def test_accuracies_on_real_and_synthetic_data_are_not_ranked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, Made(name=name, dataset=name)) for name in ("synthetic", "fashion-mnist")]
    report.main([str(run.path) for run in runs])
    page = (runs[0].report / "compare.html").read_text(encoding="utf-8")
    assert '<p class="notice">synthetic data, not Fashion-MNIST: synthetic</p>' in page
    assert "0.8566 ★" not in page
    runs_data = [read_run_data(run) for run in runs]
    assert "<td>0.8566</td>" in page
    words = "synthetic data, not Fashion-MNIST; Fashion-MNIST"
    dataset = DatasetLabel(words, is_synthetic=True)
    labels = compare.curve_labels(runs_data)
    assert labels == ["synthetic (synthetic data)", "fashion-mnist"]
    for draw in (plots.compare_loss, plots.compare_metric):
        assert {f"{words} · 2 runs", *labels} <= set(texts(draw(runs_data, labels, dataset)))


def test_long_names_of_a_sweeps_cells_are_whole_in_the_legend(tmp_path: Path) -> None:
    runs_data = [read_run_data(make_run(tmp_path, Made(name=name))) for name in "ab"]
    labels = [f"lr {lr}, global_batch_size 4096, label_smoothing 0.1" for lr in (0.001, 0.003)]
    for draw in (plots.compare_loss, plots.compare_metric):
        figure = draw(runs_data, labels, DatasetLabel("Fashion-MNIST", is_synthetic=False))
        assert {*labels} <= {*texts(figure)}


def with_metrics(run: RunDir, monitor: str, metrics: dict[str, tuple[str, list[float | None]]]) -> RunDir:
    """Give `run` other metrics: {name: (direction, value at each evaluation)}."""
    directions = {name: direction for name, (direction, _) in metrics.items()}
    write_json(run.manifest, read_json(run.manifest) | {"metrics": directions, "monitor": monitor})
    lines: list[Any] = list(metrics_log.read(run.metrics_log))
    for number, line in enumerate(line for line in lines if line["kind"] == "eval"):
        line["metrics"] = {name: values[number] for name, (_, values) in metrics.items()}
    run.metrics_log.unlink()
    metrics_log.append(run.metrics_log, lines)
    return run


def test_metrics_of_any_name_and_range_are_shown_and_the_best_is_the_lowest_if_lower_is_better(tmp_path: Path) -> None:
    metrics: Any = {"perplexity": ("lower", [90.0, 20.5, 31.25]), "bleu": ("higher", [0.1, None, 0.25])}
    page = report_of(run := with_metrics(make_run(tmp_path, Made()), "perplexity", metrics))
    for fact in ("<dt>test perplexity</dt><dd>31.2500</dd>", "<dt>test bleu</dt><dd>0.2500</dd>"):
        assert fact in page
    assert "accuracy" not in page
    figure = plots.draw_evaluations(read_run_data(run))
    assert len(figure.axes) == 3
    assert {"perplexity 31.2500, best 20.5000", "bleu 0.2500, best 0.2500", "test loss 0.383"} <= set(texts(figure))
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[94, 90], [188, 20.5], [282, 31.25]])


def test_without_metrics_or_values_the_test_loss_is_shown(tmp_path: Path) -> None:
    page = report_of(none := with_metrics(make_run(tmp_path, Made(name="none")), "loss", {}))
    assert "<dt>test loss</dt><dd>0.3833</dd>" in page
    assert len(plots.draw_evaluations(read_run_data(none)).axes) == 1
    lost: Any = {"bleu": ("higher", [None, None, None])}
    nan = with_metrics(make_run(tmp_path, Made(name="nan")), "bleu", lost)
    assert "<dt>test bleu</dt><dd>–</dd>" in report_of(nan)
    figure = plots.compare_metric(
        [read_run_data(run) for run in (none, nan)], ["none", "nan"], read_run_data(nan).dataset
    )
    assert figure.axes[0].get_ylabel() == "test loss"
    assert [np.size(line.get_xdata()) for line in figure.axes[0].lines] == [3, 3]


def test_a_comparison_marks_the_lowest_value_of_a_metric_that_is_better_lower(tmp_path: Path) -> None:
    runs = [
        with_metrics(make_run(tmp_path, Made(name=name, epochs=1)), "perplexity", {"perplexity": ("lower", [value])})
        for name, value in (("a", 31.25), ("b", 20.5))
    ]
    runs.append(make_run(tmp_path, Made(name="c", epochs=1)))
    table = {column.heading: column for column in compare.comparison_table([read_run_data(run) for run in runs])}
    assert (table["test perplexity"].cells, table["test perplexity"].best) == (["31.2500", "20.5000", "–"], {1})
    assert (table["test accuracy"].cells, table["test accuracy"].best) == (["–", "–", "0.7900"], {2})


def test_the_recipe_is_among_the_settings_of_a_page_and_of_a_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, Made(name=name, epochs=1)) for name in ("a", "b")]
    for run in runs:
        write_json(run.config, {"recipe": f"my_lab.{run.name}", **read_json(run.config)})
    assert "my_lab.a" in report_of(runs[0])
    assert report.main([str(run.path) for run in runs]) == 0
    page = (runs[0].report / "compare.html").read_text(encoding="utf-8")
    assert "<th>recipe</th>" in page
    assert "<td>my_lab.b</td>" in page


def test_a_missing_run_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run 'quickstrat'"):
        report.main(["quickstrat"])


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path, Made(epochs=1))
    code = "import sys; from jobs.commands.report import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True, timeout=60)
