"""1,000 random malformed job files and command lines: each gives a one-line error and writes nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fnet_dist.config.help import schema_of, setting_names
from fnet_dist.config.load import load_config
from fnet_dist.errors import ConfigError
from tests.helpers.config import FashionConfig

TEST = "test_every_mistake_gives_a_one_line_error_and_writes_nothing"
SCHEMAS = {name: schema_of(FashionConfig, name) for name in setting_names(FashionConfig)}
VALID: dict[str, list[Any]] = {
    "run.seed": [0, 1, 17],
    "run.max_steps": [1, 100],
    "data.dataset": ["synthetic", "auto"],
    "data.global_batch_size": [16, 64],
    "model.form": ["modules", "functional"],
    "model.dropout": [0, 0.25],
    "loss.class_weights": [[1] * 10],
    "optim.lr": [0.003, 1],
    "parallel.precision": ["bf16"],
    "parallel.timeout_s": [5, 60.5],
    "checkpoint.every_steps": [1, 100],
}
IMPOSSIBLE: list[dict[str, Any]] = [
    {"model.head": "softmax"},
    {"model.head": "softmax", "loss.name": "cross_entropy"},
    {"model.head": "logits", "loss.name": "nll"},
    {"loss.label_smoothing": 0.1},
    {"loss.class_weights": [1, 2, 3]},
    {"loss.class_weights": [0] * 10},
    {"optim.name": "adagrad", "optim.momentum": 0.9},
    {"optim.name": "lbfgs", "optim.max_grad_norm": 1.0},
    {"optim.name": "lbfgs", "parallel.grad_accum_steps": 2},
    {"optim.name": "lbfgs", "schedule.name": "cosine"},
    {"schedule.name": "onecycle", "schedule.warmup_steps": 3},
    {"data.global_batch_size": 2, "parallel.grad_accum_steps": 3},
]
JUNK = [
    "",
    " ",
    "\0",
    "\n",
    "=",
    "[",
    "é",
    "\u2028",
    "\x1b[31m",
    "\U0001f600",
    "x" * 5000,
    "9" * 5000,
    "-",
    "none ",
    "{}",
]


def bad_value(rng: random.Random, schema: dict[str, Any]) -> Any:
    """Return an invalid value for a setting with this schema, in a file and on a command line."""
    kinds = schema.get("anyOf", [schema])
    numeric = any(kind.get("type") in ("integer", "number") for kind in kinds)
    if numeric:
        return rng.choice([-1, -7.5, -(10**30), 10**30 if schema.get("type") == "integer" else -1e308, "many", "1,5"])
    if any(kind.get("type") == "array" for kind in kinds):
        return rng.choice(["many", -1, "1,,2", "1;2", ",", "-1,1"])
    if "enum" in schema:
        return rng.choice([rng.choice(schema["enum"]).upper(), rng.choice(schema["enum"]) + "x", 3, *JUNK])
    return rng.choice(["", "\0", "a\nb", "x" * 5000, "\x1b[31m", "\u2028"])


def misspelled(rng: random.Random, name: str) -> str:
    """Return `name` with a misspelled key or section, which is no setting."""
    section, key = name.split(".")
    at = rng.randrange(len(key))
    return rng.choice([f"{section}.{key[: at + 1]}{key[at]}{key[at + 1 :]}q", f"{section}x.{key}", f"{key}_"])


def toml(values: dict[str, Any]) -> str:
    """Return `values` as TOML; strings, numbers and lists are written as in JSON."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def tokens(values: dict[str, Any]) -> list[str]:
    """Return `values` as command line arguments."""
    return [f"--{n}={','.join(map(str, v)) if isinstance(v, list) else v}" for n, v in values.items()]


def broken_bytes(rng: random.Random, text: str) -> bytes:
    """Return a file that is not valid TOML, made from `text`."""
    junk = b"\xff" + rng.randbytes(rng.randrange(400))
    lines = ["x", "[run", "[run]]", "run.seed = ", "run.seed = 'a", "a = 1\na = 2", "= 3", "a = [" * 900, "a = 1 b = 2"]
    return rng.choice([text.encode() + junk, junk, b"\0" * 10, (text + rng.choice(lines) + "\n").encode()])


def broken_line(rng: random.Random, job: str, valid: dict[str, Any]) -> list[str]:
    """Return an invalid command line for any job file."""
    name, junk = rng.choice([*SCHEMAS]), rng.choice(JUNK)
    good = ["--config", job, *tokens(valid)]
    return rng.choice(
        [
            [*good, junk],
            [*good, f"--{name}"],
            [*good, f"--{name}", "--run.root", "x"],
            [*good, f"--{name}=1", f"--{name.replace('_', '-')}", "1"],
            [*good, f"--{junk}", "1"],
            [*good, f"--{junk}.{junk}", junk],
            [*good, f"--{name}.{junk}=1"],
            [*good, "--\udcff.\udcff", "\udcff"],
            [*good, "--config", job],
            [*tokens(valid)],
            ["--config", rng.choice(["no.toml", "/no/such/file.toml", ".", "/dev/null", "a\0b", "x" * 5000, "\udcff"])],
        ]
    )


def malformed(seed: int, folder: Path) -> list[str]:
    """Write a job file made from `seed` into `folder`, and return a command line that must be refused."""
    rng = random.Random(seed)
    job = folder / "job.toml"
    valid = {name: rng.choice(VALID[name]) for name in rng.sample([*VALID], rng.randrange(5))}
    what = rng.randrange(6)
    if what == 0:
        job.write_bytes(broken_bytes(rng, toml(valid)))
        return ["--config", str(job)]
    if what == 1:
        job.write_text(toml(valid))
        return broken_line(rng, str(job), {})
    if what == 2:
        wrong = rng.choice(IMPOSSIBLE)
    elif what == 3:
        wrong = {misspelled(rng, rng.choice([*SCHEMAS])): rng.choice([1, -1, "x", *JUNK])}
    else:
        name = rng.choice([*SCHEMAS])
        wrong = {name: bad_value(rng, SCHEMAS[name])}
    rest = {name: value for name, value in valid.items() if name not in wrong}
    if what == 5:
        job.write_text(toml(rest))
        return ["--config", str(job), *tokens(wrong)]
    job.write_text(toml({**rest, **wrong}))
    return ["--config", str(job), *tokens({"run.epochs": 1} if "run.epochs" not in wrong else {})]


@pytest.mark.parametrize("hundred", range(10))
def test_every_mistake_gives_a_one_line_error_and_writes_nothing(hundred, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repeat = f'python -m pytest "tests/fnet_dist/config/test_load_fuzz.py::{TEST}[{hundred}]"'
    for seed in range(hundred * 100, hundred * 100 + 100):
        argv = malformed(seed, tmp_path)
        before = (tmp_path / "job.toml").read_bytes()
        case = f"seed {seed}: {argv} with job file {before[:2000]!r}; repeat: {repeat}"
        try:
            accepted = load_config(argv, {})
        except ConfigError as error:
            line = str(error)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} escaped; {case}") from error
        else:
            raise AssertionError(f"accepted as {accepted}; {case}")
        assert line, case
        assert line.isprintable(), case
        assert len(line) < 500, case
        assert [path.name for path in tmp_path.iterdir()] == ["job.toml"], case
        assert (tmp_path / "job.toml").read_bytes() == before, case
