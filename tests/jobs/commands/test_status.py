"""Tests of `fnet status`: tables, notes and watching, for runs in every state."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from fnet_dist.errors import ConfigError
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt, claim_attempt
from fnet_dist.run.outcome import end_attempt
from fnet_dist.run.run_dir import RunDir, read_json, write_json
from jobs.commands import status
from jobs.monitor import run_state
from tests.helpers.made_run import NOTHING, Made, age, change_owner, claimed, make_run, train_line


def words(row: str) -> str:
    return " ".join(row.split())


def shown(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert status.main([*map(str, argv)]) == 0
    return capsys.readouterr().out


# The figures -------------------------------------------------------------------------------------------------------


def test_the_table_has_one_row_a_run_with_its_last_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = claimed(tmp_path, Made(name="r", steps=120, finished=False, steps_per_epoch=94))
    lines = list(metrics_log.read(run.metrics_log))
    window = lines[-1] | {"first_step": 121, "last_step": 122, "samples_per_second": 23456.7, "step_ms": 2.6}
    added: list[Any] = [train_line(121, 1, 0.25), train_line(122, 1, 0.5)]
    metrics_log.append(run.metrics_log, [*added, window | {"slowest_rank": 1, "max_over_median": 1.84}])
    rows = shown(capsys, "--root", tmp_path).splitlines()
    assert rows[1].split() == ["run", "state", "step", "(window)", "accuracy", "(window)", "rank"]
    assert rows[0].split() == ["loss", "test", "samples/s", "slowest"]
    # The accuracy after epoch 1, of which made_run makes 79 %; the loss is the mean over the last window.
    assert words(rows[2]) == "r running (7 s left) 122 of 2,814 0.3750 0.7900 23,457 rank 1, 1.8x"
    assert len(rows) == 3


def test_without_a_slowest_rank_an_epoch_or_a_window_there_is_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = claimed(tmp_path, NOTHING)
    assert words(shown(capsys, "--root", tmp_path).splitlines()[2]) == "r starting 0 of 2,814 – – – –"
    run.manifest.unlink()
    assert words(shown(capsys, "--root", tmp_path).splitlines()[2]) == "r starting – – – – –"
    metrics_log.append(run.metrics_log, [train_line(1, 1, 2.5)])
    assert words(shown(capsys, "--root", tmp_path).splitlines()[2]) == "r running 1 2.5000 – – –"


def test_an_accuracy_on_synthetic_data_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, Made(name="a", dataset="synthetic"))
    make_run(tmp_path, Made(name="b"))
    out = shown(capsys, "--root", tmp_path)
    assert "0.8566 synthetic" in next(row for row in out.splitlines() if row.startswith("a "))
    assert "synthetic" not in next(row for row in out.splitlines() if row.startswith("b "))
    assert "\ntest figures are on synthetic data, not Fashion-MNIST\n" in out


def test_the_column_is_the_monitored_metric_and_names_it_in_each_row_if_the_runs_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metric of any name, in any range; a value that was not finite is null in the log."""
    runs = {"a": ("perplexity", 23456.7), "b": ("loss", None), "c": ("mean_iou", None)}
    for name, (monitor, value) in runs.items():
        run = make_run(tmp_path, Made(name=name))
        directions = {} if monitor == "loss" else {monitor: "lower"}
        write_json(run.manifest, read_json(run.manifest) | {"metrics": directions, "monitor": monitor})
        lines: list[Any] = list(metrics_log.read(run.metrics_log))
        run.metrics_log.unlink()
        metrics = dict.fromkeys(directions, value)
        metrics_log.append(
            run.metrics_log, [line | {"metrics": metrics} if "metrics" in line else line for line in lines]
        )
    rows = shown(capsys, "--root", tmp_path).splitlines()
    assert rows[1].split()[4] == "metric"
    cells = {row.split()[0]: row.split()[6:8] for row in rows[2:]}
    assert cells == {"a": ["perplexity", "2.346e+04"], "b": ["loss", "0.3833"], "c": ["mean_iou", "–"]}
    out = shown(capsys, "a", "--root", tmp_path)
    assert out.splitlines()[1].split()[4] == "perplexity"
    assert "\ntest data, step 282: loss 0.3833, perplexity 2.346e+04\n" in out


def test_the_run_that_was_active_last_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("a", 300), ("b", 100), ("c", 200)):
        run = make_run(tmp_path, Made(name=name, finished=False))
        age(run.config, 1000)
        age(run.metrics_log, seconds)
    assert [row[0] for row in shown(capsys, "--root", tmp_path).splitlines()[2:]] == ["b", "c", "a"]


def test_one_run_lists_its_attempts_and_why_each_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone_pid: int
) -> None:
    run, attempt = claimed(tmp_path)
    end_attempt(attempt, "crash", 40, 1, restarts=True)
    change_owner(attempt, since="2026-11-24 06:31:53 +0000", time=read_json(attempt.end)["time"] - 200, pid=gone_pid)
    killed = claim_attempt(run, world_size=4)
    change_owner(killed, host="node7", pid=gone_pid)
    change_owner(killed, host=read_json(attempt.begin)["host"])
    claim_attempt(run, world_size=1)
    out = shown(capsys, "r", "--root", tmp_path)
    assert "\ntest data, step 94: loss 0.4500, accuracy 0.7900\n" in out
    table = out[out.index("attempt  end") :].splitlines()
    assert table[0].split() == ["attempt", "end", "step", "began", "lasted", "ranks", "host"]
    host = read_json(attempt.begin)["host"]
    assert table[1].split()[:3] == ["3", "resuming", "–"]
    assert table[2].split()[:4] == ["2", "no", "word", "(killed?)"]
    assert table[2].split()[-2:] == ["4", host]
    assert words(table[3]) == f"1 crash (restarted) 40 2026-11-24 06:31:53 3 min 20 s 2 {host}"


# Unreadable runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: run.manifest.write_text('{"format": 3}'), "is of format 3; this version reads format 2"),
        (lambda run: run.manifest.write_text('{"format": 1, "dataset": {}}'), "KeyError: 'train_count'"),
        (lambda run: run.metrics_log.write_text('{"a": 1}\n'), "KeyError: 'attempt'"),
        (lambda run: (run.metrics_log.unlink(), run.metrics_log.mkdir()), "IsADirectoryError"),
    ],
    ids=["format", "no counts", "another metrics log", "a directory"],
)
def test_an_unreadable_run_has_a_note_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[RunDir], object], words: str
) -> None:
    run, _ = claimed(tmp_path)
    make_run(tmp_path, Made(name="good"))
    damage(run)
    out = shown(capsys, "--root", tmp_path)
    assert [row.split()[:2] for row in out.splitlines() if row.startswith("r ")] == [["r", "unreadable"]]
    assert words in next(row for row in out.splitlines() if row.startswith("r: "))
    assert "\ngood  finished" in out
    assert words in shown(capsys, "r", "--root", tmp_path)


@pytest.mark.parametrize(
    ("damage", "state", "note"),
    [
        (lambda run: run.config.write_text("{"), "running", "empty or damaged: config.json; "),
        (lambda run: run.manifest.write_text("[1]"), "running", "empty or damaged: manifest.json; "),
        (lambda run: run.outcome.write_bytes(b"\xff\xfe"), "running", "empty or damaged: outcome.json; "),
        (lambda run: run.job.write_text(""), "running", None),
        (lambda run: Attempt(run, 1).begin.write_text(""), "running", "empty or damaged: attempts/0001/begin.json; "),
        (lambda run: Attempt(run, 1).end.write_text('{"rea'), "running", "empty or damaged: attempts/0001/end.json; "),
        (lambda run: run.attempt(2).mkdir(), "gone", None),
        (lambda run: shutil.rmtree(run.attempts), "no attempts", None),
    ],
    ids=["config", "a list", "no text", "job", "begin", "end", "no begin", "no attempts"],
)
def test_a_small_file_that_is_damaged_hides_no_other(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[RunDir], object],
    state: str,
    note: str | None,
) -> None:
    run, _ = claimed(tmp_path)
    damage(run)
    out = shown(capsys, "r", "--root", tmp_path)
    row = next(row for row in out.splitlines() if row.startswith("r "))
    assert words(row).startswith(f"r {state}")
    assert " 120 " in row
    assert [line.partition(";")[0] + "; " for line in out.splitlines() if line.startswith("r: ")] == (
        [] if note is None else [f"r: {note}"]
    )


def test_a_half_made_run_has_a_row_and_other_directories_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attempt is claimed before config.json is written."""
    claim_attempt(RunDir(tmp_path / "half"))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "notes.txt").touch()
    make_run(tmp_path, Made(name="old", finished=False))
    rows = shown(capsys, "--root", tmp_path).splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [["old", "no"], ["half", "starting"]]


def test_garbage_between_the_lines_of_a_metrics_log_changes_nothing(tmp_path: Path) -> None:
    run, _ = claimed(tmp_path)
    before = run_state.read_status(run)
    with run.metrics_log.open("ab") as file:
        file.write(b"\x00" * 5000 + b'\n{"kind": "tr\n\xff\xfe\n{"torn": ')
    assert before.figures.train is not None
    assert run_state.read_status(run) == before


def test_without_a_run_the_error_shows_how_to_start_one(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"no run in .*; start one"):
            status.main(["--root", str(root)])
        with pytest.raises(ConfigError, match="no run 'r'"):
            status.main(["r", "--root", str(root), "--watch"])


# How it looks ------------------------------------------------------------------------------------------------------


def printed(width: int, root: Path) -> list[str]:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(status.several_runs(status.runs_in(root), console)[0])
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [status.MIN_WIDTH, 80, 100, 120])
def test_no_figure_is_cut_or_folded_in_a_narrow_window(tmp_path: Path, width: int) -> None:
    run, attempt = claimed(tmp_path, Made(name="a-name-of-the-longest-kind-" + "x" * 37, dataset="synthetic"))
    run.outcome.unlink()
    config = read_json(run.config)
    write_json(run.config, config | {"run": config["run"] | {"epochs": 10_000}})
    end_attempt(attempt, "lost_ownership", 282, 75)
    window: Any = {"kind": "window", "first_step": 1, "last_step": 282, "attempt": 1, "samples_per_second": 9_876_543.2}
    metrics_log.append(run.metrics_log, [window | {"slowest_rank": 1023, "max_over_median": 12.34}])
    rows = printed(width, tmp_path)
    assert max(map(len, rows)) <= width
    words = " ".join(rows).split()
    for figure in ("282", "9,380,000", "0.8566", "synthetic", "9,876,543", "1,023,", "12.3x", "(lost_ownership)"):
        assert figure in words


def test_in_a_wide_window_a_run_is_one_line(tmp_path: Path) -> None:
    make_run(tmp_path, Made(dataset="synthetic"))
    assert "quickstart  finished  282 of 2,814" in printed(100, tmp_path)[2]
    assert len(printed(100, tmp_path)) == 4


def test_colours_are_used_on_a_terminal_and_not_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, Made(name="n" * 64))
    assert "\x1b" not in shown(capsys, "--root", tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32mfinished" in shown(capsys, "--root", tmp_path)


# Watching ----------------------------------------------------------------------------------------------------------


def test_watch_shows_the_table_again_until_the_run_has_ended(tmp_path: Path) -> None:
    run, attempt = claimed(tmp_path)
    console = Console(file=StringIO(), width=1000)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            end_attempt(attempt, "finished", 120, 0)

    status.watch(lambda: status.one_run(run, console)[::2], console, wait)
    assert isinstance(console.file, StringIO)
    out = console.file.getvalue()
    assert waits == [2.0, 2.0]
    assert [row.split()[1] for row in out.splitlines() if row.startswith("r ")] == ["running", "running", "finished"]
    assert len([row for row in out.splitlines() if row.startswith(time.strftime("%Y-"))]) == 3


def test_watch_on_a_terminal_redraws_in_place(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"})
    looks = iter([(status.Group(Text("one")), False), (status.Group(Text("two")), True)])
    status.watch(lambda: next(looks), console, lambda seconds: None)
    assert isinstance(console.file, StringIO)
    out = console.file.getvalue()
    assert "one" in out
    assert "\x1b[1A" in out[out.index("one") : out.index("two")], "the cursor goes up"
    assert "\x1b[?1049h" not in out, "the screen's content stays"


@pytest.mark.timeout(60)
def test_ctrl_c_ends_watch_with_exit_code_0(tmp_path: Path, repository: Path) -> None:
    claimed(tmp_path)
    command = [sys.executable, "-m", "jobs", "status", "--root", str(tmp_path), "--watch"]
    with subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert any(words(row).startswith("r running") for row in process.stdout)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")


def test_status_loads_nothing_heavy(tmp_path: Path, repository: Path) -> None:
    make_run(tmp_path, Made())
    program = f"""
import sys
from jobs.commands import status
status.main(["quickstart", "--root", {str(tmp_path)!r}])
print({{"torch", "wandb", "matplotlib", "numpy", "submitit"}} & {{*sys.modules}})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"
