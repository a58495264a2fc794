"""Paths as other machines know them."""

from pathlib import Path

import pytest

from fnet_dist.processes import absolute


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Make home/me, a link to export/me on this machine alone, with a project in it; the shell is there."""
    (tmp_path / "export/me/project/sub").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/me").symlink_to(tmp_path / "export/me")
    monkeypatch.chdir(tmp_path / "home/me/project")
    monkeypatch.setenv("PWD", str(tmp_path / "home/me/project"))
    return tmp_path


def test_paths_below_a_linked_home_have_the_name_that_the_shell_has(home):
    assert absolute(Path("runs/a")) == home / "home/me/project/runs/a"
    assert absolute(home / "export/me/project/sub") == home / "home/me/project/sub"
    assert absolute(home / "export/me/other/new") == home / "home/me/other/new"


def test_other_paths_and_other_names_stay(home, monkeypatch):
    assert absolute(home / "export/elsewhere") == home / "export/elsewhere"
    assert absolute(Path("/etc/hosts")) == Path("/etc/hosts")
    for stale in (str(home), "", "home/me/project", str(home / "gone")):
        monkeypatch.setenv("PWD", stale)
        assert absolute(Path("runs")) == home / "export/me/project/runs"
