"""The house rules: short files, names in one place, and quick commands that load nothing heavy."""

import ast
import re
import subprocess
import sys

import pytest

from jobs.__main__ import command_names, main
from tests.conftest import REPOSITORY

SOURCES = sorted(path for room in ("fnet_dist", "jobs", "slurm") for path in (REPOSITORY / room).rglob("*.py"))
SHORTER = {"fnet_dist/training/trainer.py": 180, "fnet_dist/train.py": 60}
FILE_NAMES = [
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "metrics.position.json",
    "notices.jsonl",
    "notices.given.json",
    "model.safetensors",
    "predictions.safetensors",
    "predictions.best.safetensors",
    "outcome.json",
    "sweep.json",
    "attempts",
    "begin.json",
    "end.json",
    "alive",
    "wandb.log",
    "tracking.json",
    "online.lock",
    "alerts.json",
    "checkpoints",
    "optimizer.safetensors",
    "state.json",
    "STOP",
    "ASK",
    "answer.json",
]
ANSWER = {"answer.json"}
ATTEMPT = {"begin.json", "end.json", "alive", "wandb.log"}
CHECKPOINT = {"model.safetensors", "optimizer.safetensors", "state.json"}
SPELLED_BY = {
    "fnet_dist/run/run_dir.py": {*FILE_NAMES} - ANSWER - ATTEMPT - CHECKPOINT | {"model.safetensors"},
    "fnet_dist/run/attempt.py": ATTEMPT,
    "fnet_dist/run/ask.py": ANSWER,
    "fnet_dist/checkpoint/storage.py": CHECKPOINT,
    "fnet_dist/config/load.py": {"manifest.json"},  # tells a run's config.json from a copy of that file
    "fnet_dist/checkpoint/resume.py": {"checkpoints"},  # an error shows what a checkpoint's path looks like
    "jobs/runs.py": {"config.json"},  # the help of a JOBFILE says that it may be one
    "jobs/commands/status.py": {"attempts"},  # a key of what it prints
    "fnet_dist/tracking/summary.py": {"attempts"},  # a key of the summary
}
NAMED = r"(^|[\s/'\"]){}($|[\s/'\"])"
BESIDE_A_SLASH = r"/{0}($|[\s/'\"])|(^|[\s/'\"]){0}/"
HEAVY = {"torch", "wandb", "submitit", "matplotlib"}


def name_of(path):
    return path.relative_to(REPOSITORY).as_posix()


def spelled(path):
    """The names of a run directory's files in the strings of a source file, docstrings and comments left out.

    A name without a dot is also a word of what people read: it counts alone, or beside a slash.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation
    ]
    return {
        name
        for name in FILE_NAMES
        for text in strings
        if text == name
        or re.search(NAMED.format(re.escape(name)) if "." in name else BESIDE_A_SLASH.format(name), text)
    }


def test_every_source_file_is_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    too_long = {name: lines for name, lines in lengths.items() if lines > SHORTER.get(name, 400)}
    assert too_long == {}, "split along a line that a newcomer would have guessed"
    assert SHORTER.keys() <= lengths.keys()


def test_every_function_is_at_most_60_lines():
    too_long = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert too_long == []


def test_the_files_of_a_run_directory_are_spelled_in_one_place():
    found = {name_of(path): names for path in SOURCES if (names := spelled(path))}
    elsewhere = {name: names - SPELLED_BY.get(name, set()) for name, names in found.items()}
    assert {name: names for name, names in elsewhere.items() if names} == {}, "ask RunDir for the path"
    assert {name: found[name] for name in SPELLED_BY} == SPELLED_BY, "what nobody spells any more is no name"


def test_no_file_is_named_util_helper_common_or_misc():
    assert [name_of(path) for path in SOURCES if re.search("util|helper|common|misc", path.stem)] == []


def test_the_help_and_the_training_program_import_nothing_heavy():
    program = f"""
import sys
import fnet_dist.train
import jobs.__main__
assert jobs.__main__.main(["--help"]) == 0
print({HEAVY} & {{*sys.modules}})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"
    assert ended.stdout.startswith("usage: fnet COMMAND")


def test_the_help_has_one_line_for_each_command_under_its_heading(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    commands = {path.stem for path in (REPOSITORY / "jobs" / "commands").glob("*.py")} - {"__init__"}
    assert re.findall(r"^\S.*", out, re.M)[2:5] == ["start and end", "look", "trust"]
    assert sorted(re.findall(r"^  (\w+) .*  ?\S", out, re.M)) == sorted(commands) == command_names()
    assert "\n  status [RUN]            state, step, loss, test metric, speed and job; --watch, --json\n" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(("name", "nearest"), [("reprot", "report"), ("dat", "data"), ("eval", "evaluate"), ("", "")])
def test_an_unknown_command_names_the_nearest_and_all_and_exits_2(name, nearest, capsys):
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: unknown command {name!r}; nearest: {nearest}")
    assert err.endswith(f"; all: {', '.join(command_names())}\n")
    assert err.count("\n") == 1


def test_no_command_at_all_shows_the_usage_and_exits_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: ")
