"""The error messages for a wrong job file or command line, word for word."""

from pathlib import Path

import pytest

from fnet_dist.config.load import load_config
from fnet_dist.errors import ConfigError


@pytest.fixture
def job(tmp_path):
    return write(tmp_path / "job.toml", "run.epochs = 3")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def error(job, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(job), *overrides], {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--optim.lr", "fast"], "optim.lr: got 'fast', expected a number > 0 (learning rate)"),
        (["--optim.lr", "-1e-3"], "optim.lr: got -0.001, expected a number > 0 (learning rate)"),
        (["--optim.lr=inf"], "optim.lr: got inf, expected a number > 0 (learning rate)"),
        (["--optim.learning_rate", "1"], "optim.learning_rate: unknown setting; nearest: optim.lr"),
        (["--data.batch-size", "1"], "data.batch_size: unknown setting; nearest: data.global_batch_size"),
        (["--optm.name", "sgd"], "optm.name: unknown setting; nearest: optim.name"),
        (["--lr", "1"], "lr: unknown setting; nearest: optim.lr"),
        (["--optim.epochs", "1"], "optim.epochs: unknown setting; another section has it: run.epochs"),
        (["--loss.q", "1"], "loss.q: unknown setting; loss has name, class_weights, label_smoothing"),
        (
            ["--q.q", "1"],
            "q.q: unknown setting; the sections are run, data, model, loss, optim, schedule, parallel, checkpoint",
        ),
        (["--schedule", "1"], "schedule: is a section, expected one of its settings: name, warmup_steps"),
        (["--model.activation", "gelu"], "model.activation: got 'gelu', expected one of relu, tanh (activation"),
        (["--run.epochs", "1e3"], "run.epochs: got '1e3', expected a whole number >= 1 (passes over the training"),
        (["--run.epochs", "9" * 20], f"run.epochs: got {'9' * 20}, expected at most 4294967295"),
        (["--parallel.timeout-s", "1e300"], "parallel.timeout_s: got 1e+300, expected a number > 0 and <= 604800 ("),
        (
            ["--checkpoint.keep-last", "1"],
            "checkpoint.keep_last: got 1, expected a whole number >= 2 and <= 1000 (number",
        ),
        (["--checkpoint.every-seconds", "0"], "checkpoint.every_seconds: got 0.0, expected a number > 0 and <= 604800"),
        (["--checkpoint.every-steps", "0"], "checkpoint.every_steps: got 0, expected a whole number >= 1, or none (s"),
        (["--checkpoint.resume", ""], "checkpoint.resume: got '', expected a path: 1 to 4000 printable characters"),
        (["--parallel.max-restarts", "-1"], "parallel.max_restarts: got -1, expected a whole number >= 0 (failed"),
        (["--run.epochs", "none"], "run.epochs: got 'none', expected a whole number >= 1"),
        (["--run.name", "-x"], "run.name: got '-x', expected 1 to 64 of A-Z a-z 0-9 . _ - and no leading '-'"),
        (["--run.name", ".."], "run.name: got '..', expected 1 to 64"),
        (["--run.root", "a\0b"], "run.root: got 'a\\x00b', expected a path"),
        (["--data.root", "~nobody-of-that-name"], "data.root: got '~nobody-of-that-name', expected a path; no home"),
        (
            ["--loss.class-weights", "1,x"],
            "loss.class_weights[1]: got 'x', expected a list (1,2,3), each a number >= 0",
        ),
        (["--loss.class-weights", "0,0"], "loss.class_weights: got (0.0, 0.0), expected one number >= 0 per class, at"),
        (["--optim.lr", "0", "--run.epochs", "0", "--run.seed", "-1"], "run.seed: got -1, expected a whole number"),
        (["--optim.lr"], "optim.lr: no value given"),
        (["--optim.lr", "--run.seed", "1"], "optim.lr: no value given"),
        (["--optim.lr", "1", "--optim.lr=2"], "optim.lr: given twice, '1' and '2'; keep one"),
        (["left", "over"], "'left': unexpected; expected --section.key VALUE"),
        (["--\udcff.x", "1"], "'\\udcff.x': unknown setting"),
    ],
)
def test_a_wrong_command_line_gives_a_one_line_error(job, tokens, message):
    assert error(job, *tokens).startswith(message)


def test_of_several_mistakes_the_first_is_reported_and_the_others_are_counted(job):
    assert error(job, "--optim.name", "x", "--run.epochs", "0", "--run.sed", "1").endswith(" (and 2 more)")
    assert error(job, "--model.head", "softmax", "--optim.momentum", "0.5").endswith(" (and 1 more)")
    assert "more)" not in error(write(job, "[optim]\nname = 'x'"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = '3'", "optim.lr: got '3', expected a number > 0 (learning rate)"),
        ("[optim]\nlr = true", "optim.lr: got True, expected a number > 0 (learning rate)"),
        ("[run]\nepochs = true", "run.epochs: got True, expected a whole number >= 1"),
        ("[run]\nepochs = 2.0", "run.epochs: got 2.0, expected a whole number >= 1"),
        ("[run]\nname = 1979-05-27", "run.name: got datetime.date(1979, 5, 27), expected text"),
        ("[optimizer]\nlr = 1", "optimizer.lr: unknown setting; nearest: optim.lr"),
        ("[optimizer]", "optimizer: unknown setting; nearest: optim"),
        ("'x\\nq' = 1\n", "'x\\\\nq': unknown setting; the sections are run,"),
        ("optim = 3", "optim: got 3, expected a section: [optim] with its settings below it"),
        ("[optim.lr]\na = 1", "optim.lr: got {'a': 1}, expected a number > 0 (learning rate)"),
        ("[run]\nepochs = 0x" + "f" * 9000, "run.epochs: got an enormous int, expected at most 4294967295"),
        ("[run]\nname." + "a." * 1500 + "a = 1", "run.name: got an enormous dict, expected text"),
        ("[run]\nname = " + "[" * 9000, "JOB: not valid TOML: maximum recursion depth exceeded"),
        (
            "[run]\nepochs = 1 2",
            "JOB: not valid TOML: Expected newline or end of document after a statement (at line 2,",
        ),
        (b"\xff\xfe", "JOB: not UTF-8 text, found byte 0xff"),
        (b"#" * 1_000_001, "JOB: has 1000001 bytes, expected at most 1000000"),
    ],
)
def test_a_wrong_job_file_gives_a_one_line_error(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    write(Path("job.toml"), text)
    assert error("job.toml").startswith(message.replace("JOB", "job.toml"))


def test_a_scalar_in_place_of_a_section_is_reported_with_and_without_overrides(job):
    assert error(write(job, "optim = 3"), "--optim.lr", "1").startswith("optim: got 3, expected a section")


def test_a_missing_job_file_is_reported_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error("jobs/x.toml").startswith("jobs/x.toml: no such file in ")
    assert error("jobs/x.toml").endswith(f" in {tmp_path}")
    assert error("/no/x.toml") == "/no/x.toml: no such file"
    assert error("a\0b").startswith("'a\\x00b': no such file")
    assert error(".") == ".: expected a file, found a directory or device"
    assert error("a" * 300).endswith(": cannot be read: File name too long")
    with pytest.raises(ConfigError, match=r"^--config: not given; expected a job file, like --config jobs/quick"):
        load_config(["--optim.lr", "1"], {})
