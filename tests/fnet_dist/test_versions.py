"""A library that lacks what is private, or has no dist-info, is no traceback."""

import sys
from pathlib import Path

import filelock
import pytest
from packaging.requirements import Requirement

from fnet_dist.errors import ConfigError
from fnet_dist.versions import library_version, private_names, requirements


@pytest.mark.parametrize(
    "use",
    [
        lambda: filelock._no_such_name,
        lambda: filelock.Timeout(no_such_parameter=1),
        lambda: __import__("filelock._no_such_module"),
    ],
)
def test_a_private_name_that_has_gone_is_one_line_with_what_to_install(use):
    with pytest.raises(ConfigError) as caught, private_names("filelock"):
        use()
    said, [needed] = str(caught.value), [each for each in requirements() if each.startswith("filelock")]
    assert said.startswith(f"filelock {filelock.__version__} is another than this code knows (")
    assert "no_such" in said
    assert said.endswith(f"expected {needed}: pip install '{needed}'")


@pytest.mark.parametrize("text", [None, "[tool.ruff]\n", '[project]\nname = "other"\ndependencies = ["x"]\n'])
def test_without_our_pyproject_the_installed_package_says_what_it_needs_or_nothing(text, tmp_path, monkeypatch):
    project = tmp_path / "pyproject.toml"
    if text is not None:
        project.write_text(text)
    for extra in ("", "workspace"):
        assert {*map(Requirement, requirements(project, extra))} == {*map(Requirement, requirements(extra=extra))}
    monkeypatch.setattr(sys, "path", [])
    assert requirements(project) == []


@pytest.mark.parametrize(("text", "version"), [("__version__ = '1.2+site'", "1.2+site"), ("", "unknown")])
def test_a_vendored_library_has_the_version_that_it_says(text, version, tmp_path: Path, monkeypatch):
    (tmp_path / "vendored.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vendored", raising=False)
    assert library_version("vendored") == version
