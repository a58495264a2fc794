"""Output that cannot be encoded, or that nobody reads, ends no command and no training; nor does an odd path."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from jobs.errors import READER_HAS_LEFT
from tests.conftest import REPOSITORY
from tests.helpers.made_run import Made, make_run

pytestmark = pytest.mark.processes

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
JOBS = (sys.executable, "-m", "jobs")
TRAIN = (
    "--data.dataset",
    "synthetic",
    "--parallel.device",
    "cpu",
    "--run.max-steps",
    "2",
    "--tracking.wandb",
    "offline",
)


def run(*command: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("ö"), Made(name="r"))


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ("status", {"PYTHONIOENCODING": "ascii"}),
        ("status", {"PYTHONIOENCODING": "iso-8859-2"}),
        ("logs", ASCII),
        ("report", ASCII),
    ],
)
def test_letters_that_the_terminal_lacks_are_replaced(made: RunDir, command: str, environment: dict[str, str]) -> None:
    ended = run(*JOBS, command, str(made.path), **environment)
    assert b"Traceback" not in ended.stderr
    assert ended.returncode == (2 if command == "logs" else 0)  # a made run has no logs: an error, with its path


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "jobs", "--help"),
        ("-m", "jobs", "run", "--help"),
        ("-m", "jobs", "status", "RUN"),
        ("-m", "fnet_dist.train", "--help"),
    ],
    ids=" ".join,
)
def test_a_reader_that_leaves_and_closed_output_end_a_command_quietly(made: RunDir, words: tuple[str, ...]) -> None:
    command = shlex.join([sys.executable, *(str(made.path) if word == "RUN" else word for word in words)])
    piped = run("bash", "-c", f"{command} | true; exit $PIPESTATUS")
    assert piped.returncode in (0, READER_HAS_LEFT)
    assert piped.stderr == b""
    assert run("bash", "-c", f"{command} >&- 2>&- <&-").returncode == 0


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        ("nonsense", (2,)),
        ("status nothere", (2,)),
        ("run --nonsense", (2,)),
        ("data verify --root nothere", (65, READER_HAS_LEFT)),  # it prints what it does, and ends where it cannot
        ("cluster up --nodes 1001", (2,)),
    ],
)
def test_a_failure_is_not_hidden_by_a_reader_that_leaves_by_closed_output_or_by_a_full_disk(
    words: str, codes: tuple[int, ...]
) -> None:
    command = f"{shlex.join(JOBS)} {words}"
    assert run("bash", "-c", f"{command} 2>&1 | true; exit $PIPESTATUS").returncode in codes
    assert run("bash", "-c", f"{command} >&- 2>&-").returncode == codes[0]
    assert run("bash", "-c", f"{command} >/dev/full 2>&1").returncode in (codes[0], 74)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with a long path, and all that shells, URLs and configuration files read as something else."""
    folder = tmp_path / ("l" * 200) / "ö \"'#?%s $x"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.soak
def test_training_in_odd_places_on_an_ascii_terminal_prints_commands_that_work(odd: Path) -> None:
    (odd / "job.toml").write_text('run.root = "$RUNS/with $$"\n', encoding="utf-8")
    (odd / "tmp").mkdir()
    environment = {"HOME": str(odd), "TMPDIR": str(odd / "tmp"), "RUNS": str(odd / "runs")}
    words = (*JOBS, "run", "job.toml", "--nproc-per-node", "2", *TRAIN, "--run.name", "r")
    ended = run(*words, cwd=odd, PYTHONIOENCODING="ascii:strict", **environment)
    assert ended.returncode == 0, ended.stderr
    assert read_outcome(RunDir(odd / "runs" / "with $" / "r"))["status"] == "finished"
    again = run(*words, cwd=odd, **environment).stdout.decode()
    hint = next(line for line in again.splitlines() if line.startswith("next: "))
    report = run("sh", "-c", hint.removeprefix("next: ").partition("; ")[0], cwd=odd, **environment)
    assert report.returncode == 0, report.stderr


def test_training_with_all_output_closed_finishes(tmp_path: Path) -> None:
    words = (*JOBS, "run", "jobs/quickstart.toml", *TRAIN, "--run.root", str(tmp_path), "--run.name", "r")
    assert run("bash", "-c", f"{shlex.join(words)} >&- 2>&- <&-").returncode == 0
    assert read_outcome(RunDir(tmp_path / "r"))["status"] == "finished"
