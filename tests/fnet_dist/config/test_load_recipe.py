"""A faulty recipe is refused in one line that names the file, and the line where there is one."""

import re
from importlib import invalidate_caches
from itertools import count

import pytest

from fnet_dist.config.load_recipe import load_recipe, recipe_errors, recipe_files
from fnet_dist.errors import ConfigError, DataError

COUNT = count()
GOOD = """
from fnet_dist.recipe import DataConfig, Section as ModelConfig

def build_dataset(config, split, device):
    raise KeyError("pixels")

def build_model(config, train_data):
    return None
"""


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Return a function: the message for a recipe with this text."""
    monkeypatch.chdir(tmp_path)

    def refuse(text):
        name = f"recipe_under_test_{next(COUNT)}"  # load_recipe leaves the directories of earlier ones in sys.path
        (tmp_path / f"{name}.py").write_text(text)
        invalidate_caches()
        with pytest.raises(ConfigError) as caught:
            load_recipe(name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torchh", r"recipe_under_test_\d+\.py:1: ModuleNotFoundError: No module named 'torchh'"),
        ("def build(:", r"recipe_under_test_\d+\.py:1: SyntaxError"),
        ("\n1 / 0", r"recipe_under_test_\d+\.py:2: ZeroDivisionError: division by zero"),
        (GOOD.replace("DataConfig, ", ""), "no DataConfig; expected a subclass of DataConfig"),
        (GOOD.replace("build_model", "make_model"), r"no function build_model\(config, train_data\)"),
        (
            GOOD.replace("(config, split, device)", "(config, split)"),
            r"\.py:4: build_dataset\(config, split\) is called",
        ),
        (GOOD + "\nLossConfig = ModelConfig", "LossConfig without build_loss"),
    ],
)
def test_a_fault_in_a_recipe_is_one_line_with_its_place(refusal, text, words):
    assert re.search(words, refusal(text))


def test_a_recipe_that_is_not_there_names_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no module 'no_such_lab'; expected one in .*, on PYTHONPATH or installed"):
        load_recipe("no_such_lab.cifar")
    with pytest.raises(ConfigError, match="expected the name of a Python module"):
        load_recipe("../cifar.py")


def test_a_function_that_raises_is_one_line_with_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good_recipe.py").write_text(GOOD)
    invalidate_caches()
    recipe = load_recipe("good_recipe")
    place = r"^build_dataset: good_recipe\.py:5: KeyError: 'pixels'"
    with pytest.raises(ConfigError, match=place), recipe_errors(recipe, "build_dataset"):
        recipe.build_dataset(None, "train", None)
    with pytest.raises(DataError, match="kept"), recipe_errors(recipe, "build_dataset"):
        raise DataError("kept")
    assert [*recipe_files("good_recipe")] == ["good_recipe.py"]
