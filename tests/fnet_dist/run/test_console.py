"""The output for people: a line after each epoch, few others, and a table that ends with the next command."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fnet_dist.run import console
from fnet_dist.run.console import ProgressPrinter, command_for, final_table, fnet_command
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, read_json
from tests.helpers.made_run import Made, make_run

EPOCH = {
    "kind": "epoch",
    "epoch": 1,
    "step": 938,
    "train_loss": 0.49783,
    "seconds": 1.2,
    "samples_per_second": 50_000.0,
    "attempt": 1,
}

EVALUATION = {"kind": "eval", "step": 938, "loss": 0.45, "metrics": {"accuracy": 0.8377}}


@pytest.fixture
def clock(monkeypatch):
    """Replace the console's clock by one that changes only when it is set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_an_epoch_prints_the_line_of_the_cookbook(capsys):
    ProgressPrinter(10, 9380).epoch(EPOCH, EVALUATION)
    assert capsys.readouterr().out == ("Training loss: 0.4978   (epoch 1/10, test accuracy 0.8377, 50,000 samples/s)\n")


def test_metrics_of_any_name_are_printed_and_without_one_the_test_loss(capsys):
    printer = ProgressPrinter(10, 9380)
    printer.epoch(EPOCH, EVALUATION | {"metrics": {}})
    printer.epoch(EPOCH, EVALUATION | {"metrics": {"perplexity": 12345.678, "r2": None}})
    printer.epoch(EPOCH, None)
    printer.evaluation(EVALUATION)
    start = "Training loss: 0.4978   (epoch 1/10"
    assert capsys.readouterr().out.splitlines() == [
        f"{start}, test loss 0.4500, 50,000 samples/s)",
        f"{start}, test perplexity 1.235e+04, test r2 –, 50,000 samples/s)",
        f"{start}, 50,000 samples/s)",
        "step 938/9,380 · test accuracy 0.8377",
    ]


def test_without_a_terminal_there_is_at_most_one_line_in_ten_seconds(clock, capsys):
    screen = ProgressPrinter(10, 9380)
    for step in range(1, 301):  # a window every tenth of a second, for half a minute
        clock.seconds = 1000 + step / 10
        screen.window(1, step, 0.5, 48_000.0)
    screen.close()
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 1/10 · step {step}/9,380 · loss 0.5000 · 48,000 samples/s" for step in (100, 200, 300)
    ]


def test_an_epoch_line_restarts_the_ten_seconds(clock, capsys):
    screen = ProgressPrinter(10, 9380)
    clock.seconds += 9
    screen.epoch(EPOCH, EVALUATION)
    clock.seconds += 9
    screen.window(2, 1000, 0.5, 48_000.0)
    assert len(capsys.readouterr().out.splitlines()) == 1
    clock.seconds += 1
    screen.window(2, 1001, 0.5, 48_000.0)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_long_lines_are_not_broken_and_brackets_are_not_markup(capsys):
    text = "[bold]" + 40 * "0123456789"
    LOGGER.info(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_terminal_shows_a_progress_bar_that_is_erased_at_the_end(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = ProgressPrinter(10, 9380)
    screen.window(3, 2000, 0.3456, 48_000.0)
    screen.epoch(EPOCH, EVALUATION)
    LOGGER.warning("[bold]" + 40 * "0123456789")
    screen.close()
    out = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "epoch 3/10" in plain
    assert "step 2,000/9,380 loss 0.3456 · 48,000 samples/s" in plain
    assert "Training loss: 0.4978   (epoch 1/10" in plain
    assert "WARNING: [bold]" + 40 * "0123456789" + "\n" in plain, "above the bar, unbroken"
    assert out.rstrip("\n").endswith("\x1b[2K"), "the bar's line is erased"
    assert "\x1b[?25h" in out.rpartition("\x1b[?25l")[2], "the cursor is back"


def test_the_table_shows_the_result_and_ends_with_the_next_command(tmp_path):
    run = make_run(tmp_path / "runs", Made(epochs=2, dataset="synthetic"))
    name = read_json(run.manifest)["dataset"]["name"]
    lines = final_table(run).split("\n")
    assert "synthetic" in name
    assert lines[0] == "finished: quickstart"
    rows = {line[2:17].strip(): line[17:] for line in lines[1:-1]}
    assert [*rows] == ["dataset", "epochs", "loss", "test accuracy", "speed", "run directory", "weights"]
    assert rows["dataset"] == f"{name}; 60,000 training and 10,000 test samples"
    assert rows["epochs"] == "2, 188 steps"
    assert re.fullmatch(r"0\.\d{4} training, 0\.4000 test", rows["loss"])
    assert rows["test accuracy"] == f"0.8400 on {name}"
    assert rows["speed"] == "50,000 samples/s in the last epoch, 2 ranks on cpu"
    assert rows["run directory"] == str(run.path)
    assert rows["weights"] == f'{run.model} (README: "Your weights")'
    assert lines[-1] == f"next: {command_for(run, 'report')}"


def test_the_table_of_one_rank_says_one_rank(tmp_path):
    assert "samples/s in the last epoch, 1 rank on cpu" in final_table(make_run(tmp_path, Made(ranks=(1,))))


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """An interpreter in TMP/.venv/bin, which PATH does not name; TMP is the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path / ".venv" / "bin" / "python"


def make_program(path):
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_the_command_names_the_run_as_short_as_it_works_from_here(tmp_path, monkeypatch, interpreter):
    make_program(interpreter)
    monkeypatch.setenv("PATH", str(interpreter.parent))
    assert command_for(RunDir(Path("runs/r")), "report") == "python -m jobs report r"
    assert command_for(RunDir(tmp_path / "runs" / "r"), "report") == "python -m jobs report r"
    assert command_for(RunDir(Path("other/r")), "report") == "python -m jobs report other/r"
    assert command_for(RunDir(Path("/far/r")), "report") == "python -m jobs report /far/r"


def test_the_command_names_this_interpreter_where_python_is_another_or_none(tmp_path, monkeypatch, interpreter):
    assert command_for(RunDir(Path("runs/r")), "report") == ".venv/bin/python -m jobs report r"
    monkeypatch.setattr(sys, "executable", "/far/bin/python")
    assert command_for(RunDir(Path("runs/r")), "report") == "/far/bin/python -m jobs report r"


def test_the_command_is_fnet_where_its_script_belongs_to_this_interpreter_and_runs_this_code(monkeypatch, interpreter):
    monkeypatch.setattr(console, "is_installed", lambda: True)
    make_program(interpreter.with_name("fnet"))
    assert fnet_command() == ".venv/bin/fnet"
    monkeypatch.setenv("PATH", str(interpreter.parent))
    assert command_for(RunDir(Path("runs/r")), "report") == "fnet report r"
    monkeypatch.setattr(console, "is_installed", lambda: False)
    assert fnet_command() == ".venv/bin/python -m jobs"
