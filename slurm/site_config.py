"""The settings of a site, from site.toml: the file that FNET_SITE names, else slurm/site.toml where this code lies.

The current directory does not matter. site.example.toml explains the settings.
"""

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template

from slurm.errors import OptionError
from slurm.sbatch_options import NAMES, checked
from slurm.types import Partition

_CHOICES = {"run_mode": ("private", "group"), "control": ("owner", "group")}
_LISTS = {"setup": "a list of shell lines", "srun_args": "a list of arguments"}


def site_path() -> Path:
    """Return the path of site.toml, which need not exist."""
    return Path(os.environ.get("FNET_SITE") or Path(__file__).with_name("site.toml")).expanduser()


@dataclass(frozen=True)
class Site:
    """A site's settings; None if not set. `setup` holds shell lines that run on the first node before a job and must
    succeed, `interface` is the network interface by which nodes connect, `python` the interpreter of jobs. `container`
    holds the words before it on the nodes, `srun_args` further arguments of srun, `notify` the words of the command
    that gets notices, `login` the host and directory where commands run. `run_mode` is private or group, `control` is
    owner or group: who stops, cancels and resumes a shared run."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    wckey: str | None = None
    gpu_type: str | None = None
    setup: tuple[str, ...] = ()
    run_root: str | None = None
    data_root: str | None = None
    interface: str | None = None
    python: str | None = None
    container: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    notify: tuple[str, ...] = ()
    login: str | None = None
    run_mode: str | None = None
    control: str | None = None

    @property
    def options(self) -> Mapping[str, str | None]:
        """The settings that are options of sbatch."""
        return {name: getattr(self, name) for name in NAMES}


def read_site(path: Path | None = None) -> Site:
    """Return the settings in `path`, or in site_path(); without that file, no settings.

    Raises OptionError, one line, if a setting is unknown or malformed, or if FNET_SITE names no file.
    """
    if path is None:
        path = site_path()
        if os.environ.get("FNET_SITE") and not path.exists():  # mistyped: to go on would lose the account, for example
            raise OptionError(f"FNET_SITE: no file {path}; create it, or unset the variable")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return Site()
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: {error}") from None
    known = [field.name for field in fields(Site)]
    for key, value in settings.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]  # cutoff 0: always name one
            raise OptionError(f"{path}: unknown key {key!r}; nearest: {nearest}; all: {', '.join(known)}")
        lines = value if isinstance(value, list) else [value]
        # A line break would begin a command in the script.
        are_lines = all(isinstance(line, str) and line.isprintable() and line.strip() for line in lines)
        if isinstance(value, list) != (key in _LISTS) or not are_lines:
            raise OptionError(f"{path}: {key} is {value!r}, expected {_LISTS.get(key, 'one line of text')}")
        if key in (*NAMES, "interface", "python"):  # they reach a script or a command
            checked(key, value)
        if value not in _CHOICES.get(key, (value,)):
            raise OptionError(f"{path}: {key} is {value!r}, expected {' or '.join(_CHOICES[key])}")
        if key in ("run_root", "data_root"):
            settings[key] = _expanded(f"{path}: {key}", value)
        if key == "notify":
            try:
                words = shlex.split(value)  # before variables are expanded: a value is never more than one word
                settings[key] = tuple(_with_home(_expanded(f"{path}: {key}", word)) for word in words)
            except ValueError as error:
                raise OptionError(f"{path}: {key} is {value!r}: {error}") from None
    try:
        settings["container"] = tuple(shlex.split(settings.get("container", "")))
    except ValueError as error:
        raise OptionError(f"{path}: container is {settings['container']!r}: {error}") from None
    return Site(**settings | {key: tuple(settings.get(key, ())) for key in _LISTS})


def read_login() -> Site:
    """Return `login` and `python` alone, all that counts on a laptop. A file that cannot be read has none of them: the
    command itself says what is wrong with it."""
    try:
        settings = tomllib.loads(site_path().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return Site()
    return Site(**{key: settings[key] for key in ("login", "python") if isinstance(settings.get(key), str)})


def _expanded(where: str, text: str) -> str:
    """Return `text` with $NAME and ${NAME} replaced. Raises OptionError, which begins with `where`, if one is unset."""
    try:
        return Template(text).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise OptionError(f"{where}: the variable {error.args[0]} is not set") from None
    except ValueError:
        raise OptionError(f"{where}: a $ begins no variable's name; write it as $$") from None


def _with_home(word: str) -> str:
    """Return a word with ~ at its begin replaced by the home directory."""
    try:
        return str(Path(word).expanduser()) if word.startswith("~") else word
    except RuntimeError as error:  # an unknown user
        raise ValueError(error) from None


def first_site(partitions: Sequence[Partition], example: str) -> str:
    """Return the text of a first site.toml: `example` with the default partition, or the only one, filled in."""
    default = next((each.name for each in partitions if each.is_default or len(partitions) == 1), None)
    names = ", ".join(partition.name for partition in partitions)
    line = f'# partition = ""  # one of {names}' if default is None else f'partition = "{default}"  # of {names}'
    _, first, rest = example.partition("# Options of sbatch")
    return "# Settings of this site; slurm/site.example.toml explains them.\n\n" + re.sub(
        r"^# partition = .*$", lambda _: line, first + rest, count=1, flags=re.M
    )
