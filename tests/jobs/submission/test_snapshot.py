"""The code that a job runs: what is copied, what is not, and that a change is noticed."""

import subprocess
import sys

import pytest

from fnet_dist.config.load_recipe import DEFAULT_RECIPE
from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT
from fnet_dist.run import git
from fnet_dist.run.git import code_files, git_state
from jobs.submission.snapshot import digest_of, is_whole, recipe_setup, take_snapshot


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with a file of every kind."""
    root = tmp_path / "checkout"
    for name in ("tracked.py", "room/also.toml", "untracked.py", "ignored.bin", "runs/r/config.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to("tracked.py")
    (root / ".gitignore").write_text("*.bin\n")
    for words in (["init", "-q"], ["add", "tracked.py", "room", "link", ".gitignore"], ["commit", "-qm", "one"]):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", *words], cwd=root, check=True)
    return root


def test_tracked_and_untracked_files_are_copied_ignored_ones_and_runs_are_not(checkout, tmp_path):
    code = take_snapshot(checkout, tmp_path / "code")
    copied = sorted(path.relative_to(code).as_posix() for path in code.rglob("*") if not path.is_dir())
    assert copied == [".gitignore", "link", "room/also.toml", "snapshot.json", "tracked.py", "untracked.py"]
    assert (code / "link").readlink().as_posix() == "tracked.py"
    assert git_state(code) == git_state(checkout)
    assert git_state(code)["dirty"]


def test_a_snapshots_name_is_its_digest_and_the_same_code_is_copied_once(checkout, tmp_path):
    code = take_snapshot(checkout, tmp_path / "code")
    assert code.name == digest_of({file: checkout / file for file in code_files(checkout)})
    inode = (code / "tracked.py").stat().st_ino
    assert (take_snapshot(checkout, tmp_path / "code") / "tracked.py").stat().st_ino == inode
    (checkout / "tracked.py").chmod(0o755)
    assert take_snapshot(checkout, tmp_path / "code") != code


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_snapshot_that_was_changed_is_detected_and_replaced(checkout, tmp_path, change):
    code = take_snapshot(checkout, tmp_path / "code")
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "tracked.pyc").write_text("made by running it")
    (code / "core.4711").write_text("left by a rank that crashed")
    assert is_whole(code)
    match change:
        case "edited":
            (code / "tracked.py").write_text("other")
        case "removed":
            (code / "untracked.py").unlink()
    assert not is_whole(code)
    assert take_snapshot(checkout, tmp_path / "code") == code
    assert is_whole(code)


def test_code_of_more_than_100_mb_is_refused_and_the_largest_files_are_named(checkout, monkeypatch):
    monkeypatch.setattr(git, "LARGEST_BYTES", 50)
    (checkout / "weights.pt").write_bytes(bytes(60))
    with pytest.raises(ConfigError, match=r"add to \.gitignore what is no code: weights\.pt \(0\.0 MB\), "):
        code_files(checkout)


def test_a_snapshot_inside_a_checkout_cannot_be_copied_as_git_ignores_it(checkout):
    """git ignores it; who goes back to old code starts from there."""
    (checkout / ".git" / "info" / "exclude").write_text("runs/\n")
    code = take_snapshot(checkout, checkout / "runs" / "r" / "code")
    with pytest.raises(ConfigError, match="git ignores it; or run the code where it lies: --no-snapshot"):
        take_snapshot(code, checkout / "copy")


def test_without_git_it_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"not a git repository.*--no-snapshot"):
        take_snapshot(tmp_path, tmp_path / "code")


def test_a_recipe_from_elsewhere_is_copied_along(checkout, tmp_path, monkeypatch):
    lab = tmp_path / "elsewhere" / "some_lab"
    (lab / "__pycache__").mkdir(parents=True)
    (lab / "__init__.py").touch()
    (lab / "words.txt").write_text("the vocabulary")
    (lab / "_netrc").write_text("a key")
    (lab / "__pycache__" / "cached.pyc").touch()
    sections = "from fnet_dist.recipe import DataConfig, Section as ModelConfig\n"
    functions = "def build_dataset(config, split, device): ...\ndef build_model(config, train_data): ...\n"
    (lab / "numbers.py").write_text(sections + functions)
    monkeypatch.syspath_prepend(lab.parent)
    code = take_snapshot(checkout, tmp_path / "code", "some_lab.numbers")
    assert sorted(path.name for path in (code / "some_lab").iterdir()) == ["__init__.py", "numbers.py", "words.txt"]
    assert (code / "tracked.py").exists()
    assert is_whole(code)
    assert code != take_snapshot(checkout, tmp_path / "code")


def test_a_job_without_a_copy_is_told_where_a_recipe_of_the_current_directory_lies(tmp_path, monkeypatch):
    place = tmp_path / "my lab"
    place.mkdir()
    (place / "cats.py").write_text("from fnet_dist.recipes.fashion_mnist import *\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    [line] = recipe_setup(CODE_ROOT, "cats")
    for before, after in (("", f"{place}"), ("/other", f"/other:{place}")):
        words, variables = ["sh", "-c", f"{line}; echo $PYTHONPATH"], {"PYTHONPATH": before}
        shell = subprocess.run(words, env=variables, check=True, capture_output=True, text=True)
        assert shell.stdout == f"{after}\n"
    assert recipe_setup(tmp_path / "copy", "cats") == ()
    assert recipe_setup(CODE_ROOT, DEFAULT_RECIPE) == ()
