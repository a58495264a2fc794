"""What the documents name exists: paths, make targets, verbs, settings, job files."""

import re
from pathlib import Path

import pytest

from fnet_dist.config.help import setting_names
from fnet_dist.config.load import load_config
from jobs.__main__ import command_names

DOCUMENTS = ("README.md", "fnet_dist/README.md", ".github/CONTRIBUTING.md")


@pytest.fixture(scope="module", params=DOCUMENTS)
def document(request: pytest.FixtureRequest, repository: Path) -> str:
    return (repository / request.param).read_text(encoding="utf-8")


def test_every_path_exists(document: str, repository: Path) -> None:
    paths = re.findall(r"(?<![\w/.*~-])[\w.-]+(?:/[\w.-]+)*\.(?:py|toml|md|png|txt)\b", document)
    paths += re.findall(r"`((?:tests|jobs|fnet_dist|slurm)/[\w/.-]*)`", document)
    assert paths
    places = (repository, repository / "fnet_dist")
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


def test_every_command_exists(document: str, repository: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ {4})make ([a-z]+)", document, re.MULTILINE)) <= set(targets)
    assert set(re.findall(r"python -m jobs ([a-z]+)", document)) <= set(command_names())


def test_every_setting_exists(document: str) -> None:
    given = {name.replace("-", "_") for name in re.findall(r"--([a-z]+\.[a-z-]+)", document)}
    assert given <= set(setting_names()) | {"section.key"}


def test_every_training_command_of_the_readme_loads(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    readme = (repository / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"-m fnet_dist\.train (--config [^`\n]*)", readme)
    assert len(commands) >= 10
    for command in commands:
        load_config(command.split(), env={})


def test_every_job_file_loads_and_says_command_hardware_accuracy_and_time(repository: Path) -> None:
    for path in (repository / "jobs").glob("*.toml"):
        load_config(["--config", str(path)], env={})
        head = path.read_text(encoding="utf-8").split("\n[")[0]
        for words in (f"-m fnet_dist.train --config jobs/{path.name}", "accuracy", " s", "core"):
            assert words in head, f"{path.name}: {words!r} is not in its head comment"


def test_documents_stay_short(repository: Path) -> None:
    assert len((repository / "fnet_dist/README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert len((repository / ".github/CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 40


def test_the_design_names_every_room_of_the_trainer(repository: Path) -> None:
    design = (repository / "fnet_dist/README.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (repository / "fnet_dist").glob("*/__init__.py")}
    assert {name for name in rooms if f"{name}/" not in design} == set()
