"""A recipe's own settings are read, checked and explained like all others."""

import json
import sys
from types import ModuleType

import pytest
from pydantic import Field

from fnet_dist.config.fields import Section
from fnet_dist.config.help import settings_help
from fnet_dist.config.load import dump_config, read_config, settings_class
from fnet_dist.config.load_recipe import load_recipe
from fnet_dist.config.recipe_sections import DataConfig
from fnet_dist.errors import ConfigError
from tests.helpers.job_files import error, load, write


class OtherData(DataConfig):
    files: str
    shuffle: bool = True


class OtherModel(Section):
    channels: tuple[int, ...] = Field(default=(8, 16))
    blocks: int = Field(default=2, ge=1, description="residual blocks")


@pytest.fixture
def recipe(monkeypatch):
    """Return the name of an importable recipe with these settings."""
    module = ModuleType("other_recipe")
    vars(module).update(DataConfig=OtherData, ModelConfig=OtherModel)
    vars(module).update(build_dataset=lambda config, split, device: None, build_model=lambda config, train_data: None)
    monkeypatch.setitem(sys.modules, "other_recipe", module)
    load_recipe.cache_clear()
    return "other_recipe"


def test_data_and_model_may_have_other_settings(job, recipe):
    write(job, f'recipe = "{recipe}"\n[model]\nchannels = [4, 4]')
    other = load(job, "--data.files", "f", "--data.shuffle", "false", env={"FNET_DATA": "/unused"})
    assert (other.data.files, other.data.shuffle, other.model.channels) == ("f", False, (4, 4))
    assert load(job, "--data.files=f", "--model.channels", "1,2").model.channels == (1, 2)
    assert (
        error(job) == "data.files: not given, and it has no default; fix: --data.files VALUE or a line in the job file"
    )
    assert error(job, "--data.files=f", "--data.shuffle=no") == "data.shuffle: got 'no', expected true or false"
    assert error(job, "--data.files=f", "--model.head=x").startswith("model.head: unknown setting; model has channels,")
    assert "files (text; required)" in settings_help(settings_class(["run", str(job)]))


def test_the_command_line_overrides_the_recipe_and_the_runs_name_tells(job, recipe):
    default = load(job)
    other = load(job, "--recipe", recipe, "--data.files", "f")
    assert (default.recipe, other.recipe) == ("fnet_dist.recipes.fashion_mnist", recipe)
    assert other.run.name != default.run.name
    assert "residual blocks" in settings_help(settings_class(["--recipe", recipe]))


def test_a_path_among_the_settings_is_shown_in_w_and_b_as_it_is(job, recipe, tmp_path):
    write(job, f'recipe = "{recipe}"')
    config = load(job, "--data.files", "lab/a:b.pt")
    assert config.tracking.name == f"{config.run.name} data.files=lab/a:b.pt"
    path = write(tmp_path / "config.json", json.dumps(dump_config(config)))
    assert read_config(path) == config


def test_a_setting_that_was_removed_names_the_file_of_the_run(job, recipe, tmp_path):
    write(job, f'recipe = "{recipe}"')
    stored = dump_config(load(job, "--data.files", "f"))
    stored["model"]["widths"] = 3
    path = write(tmp_path / "config.json", json.dumps(stored))
    with pytest.raises(ConfigError, match=rf"^{path}: model.widths: unknown setting"):
        read_config(path)
