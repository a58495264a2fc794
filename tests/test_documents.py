"""The documents name only what exists: paths, make targets, commands, settings, training commands, rooms."""

import os
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fnet_dist.config.help import setting_names
from fnet_dist.config.load import load_config
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from tests.helpers.config import FashionConfig

LONGEST = {  # lines
    "README.md": 150,
    "jobs/README.md": 195,
    "fnet_dist/README.md": 155,
    "fnet_dist/recipes/README.md": 110,
    "fnet_dist/run/README.md": 200,
    "fnet_dist/tracking/README.md": 180,
    "slurm/README.md": 190,
    "tests/README.md": 100,
    ".github/CONTRIBUTING.md": 50,
}
README_WORDS = 1500
PATH = re.compile(r"(?<![\w/.*~<-])[\w.-]+(?:/[\w.-]+)*\.(?:py|toml|md|png|txt|sbatch)\b")
FOLDER = re.compile(r"`((?:tests|jobs|fnet_dist|slurm)/[\w/-]*)`")
COMMAND = re.compile(r"(?<![\w.-])(?:fnet|-m jobs) ([a-z]+)")
MODULE = re.compile(r"-m (tests\.\w+(?:\.\w+)*)")
SETTING = re.compile(r"--([a-z_]+\.[a-z_-]+)")
MADE_UP = {
    "spirals.py",
    "spirals.toml",
    "jobs/mine.toml",
    "site.toml",
    "slurm/site.toml",
    "job.sbatch",
    "rank_R.stacks.txt",
    "rank_R.operations.txt",
}  # files that a user or a run writes


@pytest.fixture(params=LONGEST)
def document(request: pytest.FixtureRequest) -> str:
    """The path of a document."""
    name: str = request.param
    return name


def read(repository: Path, document: str) -> str:
    return (repository / document).read_text(encoding="utf-8")


def missing_paths(repository: Path, document: str) -> list[str]:
    """Return the paths that `document` names and that are neither in the repository nor in the document's own room."""
    text = read(repository, document)
    room = (repository / document).parent
    places = (repository, repository / "fnet_dist", room, *(path for path in room.iterdir() if path.is_dir()))
    paths = {*PATH.findall(text), *FOLDER.findall(text)} - MADE_UP
    return sorted(path for path in paths if not any((place / path).exists() for place in places))


def unknown_commands(repository: Path, text: str) -> set[str]:
    """Return the commands of fnet that `text` names and that have no file in jobs/commands/."""
    return {*COMMAND.findall(text)} - {path.stem for path in (repository / "jobs/commands").glob("[!_]*.py")}


def unknown_settings(text: str) -> set[str]:
    """Return the settings that `text` gives on a command line and that do not exist."""
    return {name.replace("-", "_") for name in SETTING.findall(text)} - {*setting_names(FashionConfig), "section.key"}


def test_every_path_exists(document: str, repository: Path) -> None:
    assert missing_paths(repository, document) == []


def test_every_command_exists(document: str, repository: Path) -> None:
    text = read(repository, document)
    assert unknown_commands(repository, text) == set()
    targets = re.findall(r"^([a-z]+):", read(repository, "Makefile"), re.MULTILINE)
    assert {*re.findall(r"(?:`|^ {4}(?:\$ )?)make ([a-z]+)", text, re.MULTILINE)} <= {*targets}
    modules = [repository / name.replace(".", "/") for name in MODULE.findall(text)]
    runnable = (".py", "/__main__.py")
    assert [path for path in modules if not any(Path(f"{path}{end}").exists() for end in runnable)] == []


def test_every_setting_exists(document: str, repository: Path) -> None:
    assert unknown_settings(read(repository, document)) == set()


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("`fnet reprot x`", {"reprot"}),
        ("    python -m jobs runn jobs/node.toml", {"runn"}),
        ("try `.venv/bin/fnet runs`, or fnet run", {"runs"}),
        ("fnet status, `python -m jobs logs -f`; fnet_dist has it", set()),
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str, commands: set[str], repository: Path) -> None:
    assert unknown_commands(repository, text) == commands


def test_a_setting_that_does_not_exist_is_found() -> None:
    assert unknown_settings("--optim.lr 0.1 --optim.learning-rate 0.1 --run.max-steps 5") == {"optim.learning_rate"}


def test_a_path_that_does_not_exist_is_found(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/a.toml").touch()
    (tmp_path / "jobs/README.md").write_text("`jobs/a.toml`, a.toml, `jobs/b.toml`, c.py, `tests/none/`")
    assert missing_paths(tmp_path, "jobs/README.md") == ["c.py", "jobs/b.toml", "tests/none/"]


def test_every_training_command_loads(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    found = 0
    for document in LONGEST:
        text = read(repository, document).replace("\\\n", " ") if (repository / document).exists() else ""
        for command in re.findall(r"-m fnet_dist\.train (--config jobs/[^`\n]*)", text):
            load_config(command.split(), env={})
            found += 1
        for jobfile in re.findall(r"(?:fnet|-m jobs) (?:run|submit|rehearse|sweep) (jobs/[\w.]+)", text):
            if jobfile not in MADE_UP:
                load_config(["--config", jobfile], env={})
                found += 1
    assert found >= 12


def test_every_setting_of_a_job_file_in_a_document_exists(document: str, repository: Path) -> None:
    section, given = "", set()
    for line in re.findall(r"^ {4}(.*)", read(repository, document), re.MULTILINE):
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif section and (key := re.match(r"(\w+) = ", line)):
            given.add(f"{section}.{key[1]}")
        else:
            section = ""
    assert given <= {*setting_names(FashionConfig)}


def test_every_job_file_loads_and_says_command_hardware_accuracy_and_time(repository: Path) -> None:
    for path in (repository / "jobs").glob("*.toml"):
        load_config(["--config", str(path)], env={})
        head = path.read_text(encoding="utf-8").split("\n[")[0]
        for words in (f"-m fnet_dist.train --config jobs/{path.name}", "accuracy", " s", "core"):
            assert words in head, f"{path.name}: {words!r} is not in its head comment"


def test_documents_stay_short(document: str, repository: Path) -> None:
    assert len(read(repository, document).splitlines()) <= LONGEST[document]


def test_the_readme_can_be_read_in_five_minutes(repository: Path) -> None:
    assert len(read(repository, "README.md").split()) <= README_WORDS


def test_the_readme_links_every_other_document(repository: Path) -> None:
    readme = read(repository, "README.md")
    assert [name for name in LONGEST if name not in readme] == []


def test_the_design_names_every_room_of_the_trainer(repository: Path) -> None:
    design = read(repository, "fnet_dist/README.md")
    rooms = {path.parent.name for path in (repository / "fnet_dist").glob("*/__init__.py")}
    assert {name for name in rooms if f"{name}/" not in design} == set()


def test_the_command_list_of_the_readme_is_complete(repository: Path) -> None:
    commands = {path.stem for path in (repository / "jobs/commands").glob("[!_]*.py")}
    assert commands <= {*COMMAND.findall(read(repository, "README.md"))}


def test_the_words_of_the_design_are_each_defined_once(repository: Path) -> None:
    defined = re.findall(r"^\| ([a-z ]+) \|", read(repository, "fnet_dist/README.md"), re.MULTILINE)
    words = {"run", "attempt", "window", "rehearsal", "drill", "microbatch", "local batch", "logical shard"}
    assert words <= {*defined}
    assert len({*defined}) == len(defined)


def test_the_readme_loads_the_weights_of_a_run(repository: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", read(repository, "README.md"), re.DOTALL)
    golden = repository / "tests/golden/run"
    names: dict[str, object] = {}
    exec(code.replace("runs/quickstart", str(golden)), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    saved = load_file(golden / "model.safetensors")
    assert model.state_dict().keys() == saved.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.processes
def test_optuna_drives_runs_as_the_readme_shows(repository: Path, tmp_path: Path) -> None:
    """Two trials of a short job, then a third as if the program had been started again."""
    (code,) = re.findall(r"```python\n(.*?)```", read(repository, "jobs/README.md"), re.DOTALL)
    assert code.count("range(20)") == 1
    (tmp_path / "jobs").mkdir()
    short = 'data = {dataset = "synthetic", global_batch_size = 600}\nrun = {epochs = 1, max_steps = 5}\n'
    (tmp_path / "jobs/baseline.toml").write_text(f'{short}parallel = {{device = "cpu"}}\n', encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for trials in ("range(2)", "range(1)"):
        ended = subprocess.run(
            [sys.executable, "-c", code.replace("range(20)", trials)],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
    study = optuna.load_study(study_name="baseline", storage=f"sqlite:///{tmp_path}/optuna.db")
    outcomes = [read_outcome(RunDir(tmp_path / "runs" / f"baseline-{number}")) for number in range(3)]
    assert [outcome and outcome["metrics"] and outcome["metrics"]["accuracy"] for outcome in outcomes] == [
        trial.value for trial in study.trials
    ]
    assert len({trial.params["optim.lr"] for trial in study.trials}) == 3
    assert ended.stdout.splitlines()[-1].startswith(f"{study.best_trial.number} {study.best_value} {{'optim.lr': ")
