"""Import a recipe, the module that a job file names, and check that it is one (fnet_dist/recipe.py). No torch here."""

import inspect
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fnet_dist.config.fields import Section
from fnet_dist.config.recipe_sections import DataConfig
from fnet_dist.errors import ConfigError, FnetError

DEFAULT_RECIPE = "fnet_dist.recipes.fashion_mnist"
_PAGE = "fnet_dist/recipe.py describes what a recipe has"
_SECTIONS = {"DataConfig": DataConfig, "ModelConfig": Section, "LossConfig": Section}
_PARAMETERS = {
    "build_dataset": "config, split, device",
    "build_model": "config, train_data",
    "build_loss": "config, train_data",
    "parameter_groups": "model, config",
    "missing_data": "config",
    "has_real_data": "config",
}
_OPTIONAL = ("LossConfig", "build_loss", "parameter_groups", "missing_data", "has_real_data")


@cache
def load_recipe(name: str) -> ModuleType:
    """Return the module `name`: from sys.path, else from the current directory.

    Raise ConfigError, one line with file and line, if it cannot be imported or is no recipe.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError(f"recipe: got {name[:60]!r}, expected the name of a Python module, like {DEFAULT_RECIPE}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: `fnet` is a script, and Python puts only the script's own directory there
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"recipe {name}: {_place(error, name)}") from error
        raise ConfigError(
            f"recipe {name}: no module {error.name!r}; expected one in {here}, on PYTHONPATH or installed"
        ) from None
    except FnetError:
        raise
    except Exception as error:
        raise ConfigError(f"recipe {name}: {_place(error, name)}") from error
    _check(module)
    return module


def _check(recipe: ModuleType) -> None:
    """Raise ConfigError for the first name that `recipe` lacks, or that is not what a recipe has."""
    file = short_path(getattr(recipe, "__file__", None) or recipe.__name__)
    for name, base in _SECTIONS.items():
        value = getattr(recipe, name, None)
        if value is None and name in _OPTIONAL:
            continue
        if not (isinstance(value, type) and issubclass(value, base)):
            found = "no" if value is None else f"{value!r} as"
            raise ConfigError(f"{file}: {found} {name}; expected a subclass of {base.__name__}; {_PAGE}")
    for name, parameters in _PARAMETERS.items():
        function = getattr(recipe, name, None)
        if function is None and name in _OPTIONAL:
            continue
        if not callable(function):
            raise ConfigError(f"{file}: no function {name}({parameters}); {_PAGE}")
        try:
            inspect.signature(function).bind(*parameters.split(", "))
        except TypeError as error:
            code = getattr(inspect.unwrap(function), "__code__", None)
            where = file if code is None else f"{short_path(code.co_filename)}:{code.co_firstlineno}"
            found = f"{name}{inspect.signature(function)}"
            raise ConfigError(f"{where}: {found} is called as {name}({parameters}): {error}; {_PAGE}") from None
    if hasattr(recipe, "LossConfig") and not hasattr(recipe, "build_loss"):
        raise ConfigError(f"{file}: LossConfig without build_loss(config, train_data), which would read it; {_PAGE}")


@contextmanager
def recipe_errors(recipe: ModuleType, doing: str) -> Iterator[None]:
    """Turn an exception of the recipe's code in the block into a ConfigError: one line with file and line."""
    try:
        yield
    except FnetError:
        raise
    except Exception as error:
        logging.getLogger("fnet_dist").debug(f"{doing} of recipe {recipe.__name__} failed", exc_info=error)
        raise ConfigError(f"{doing}: {_place(error, recipe.__name__)}; FNET_LOG=debug shows the traceback") from error


def recipe_files(name: str) -> dict[str, Path]:
    """Return the Python files of a recipe, {name for people: path}: of its package, or of a lone module its own.

    A lone module's are also those that it has imported from its directory.
    """
    top = import_module(name.partition(".")[0])
    if hasattr(top, "__path__"):
        roots = [Path(path) for path in top.__path__]
        return {
            f"{root.name}/{path.relative_to(root).as_posix()}": path for root in roots for path in root.rglob("*.py")
        }
    folder = Path(top.__file__ or ".").parent
    loaded = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    return {
        path.name: path for path in map(Path, filter(None, loaded)) if path.parent == folder and path.suffix == ".py"
    }


def _place(error: Exception, recipe: str) -> str:
    """Return "file:line: Type: text" of the innermost frame that lies in the recipe's files, else the innermost."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short_path(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    module = sys.modules.get(recipe) or sys.modules.get(recipe.partition(".")[0])
    folder = None if module is None or module.__file__ is None else Path(module.__file__).parent
    own = [frame for frame in frames if folder is not None and _is_recipes(Path(frame.filename), folder)]
    frame = (own or frames)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{short_path(frame.filename)}:{frame.lineno}: {type(error).__name__}: {text}"


def _is_recipes(file: Path, folder: Path) -> bool:
    """Return True if `file` is in the recipe's folder. That may be our checkout: our own files are none of it."""
    package = Path(__file__).parents[1]
    is_ours = file.is_relative_to(package) and not file.is_relative_to(package / "recipes")
    return file.is_relative_to(folder) and not is_ours


def short_path(path: str | Path) -> str:
    """Return `path` relative to the current directory, if it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
