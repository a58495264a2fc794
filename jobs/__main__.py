"""fnet COMMAND: find the command's module by its name in jobs/commands/ and run its `main`, here or on a cluster."""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Optional

if sys.version_info < (3, 11):  # noqa: UP036  # an older one runs this line, and could not import what follows
    sys.exit(
        "error: Python {}.{}.{} at {}, expected 3.11 or later; python3.11 -m venv .venv, or `make run`".format(
            *sys.version_info[:3], sys.executable
        )
    )

from fnet_dist.errors import ConfigError
from jobs.errors import run_command
from jobs.login import chosen_login, run_there
from slurm.site_config import read_login

COMMANDS = Path(__file__).with_name("commands")
GROUPS = ("start and end", "look", "trust")  # headings of the help, in this order
HELP = """usage: fnet COMMAND [JOBFILE | RUN] [options] [--section.key VALUE ...]

JOBFILE is a .toml file. RUN is a run's name, directory or Slurm job id; without [RUN], the newest (status: all).

{}

settings                  --optim.lr 0.001; `fnet run --help` lists all, with units and defaults
exit codes                0 finished  1 failed  2 usage  65 bad data or checkpoint  74 I/O  75 goes on later  130 Ctrl-C
example                   fnet run jobs/quickstart.toml --nproc-per-node 2
without fnet              python -m jobs COMMAND
"""


def main(argv: Optional[Sequence[str]] = None) -> int:  # noqa: UP045  # older Pythons must be able to read this line
    """Run the command in argv[0] (`sys.argv[1:]` if argv is None) with the rest, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        return run_command(lambda: print(help_text(), end="") or (0 if words else 2))
    try:
        return run_command(_run, *words)
    except KeyboardInterrupt:
        return 130


def _run(name: str, *words: str) -> int:
    names = command_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown command {name!r}; nearest: {nearest}; all: {', '.join(names)}")
    login = chosen_login(read_login())
    if login is not None:
        return run_there(login, [name, *words])
    command: Callable[[Sequence[str]], int] = import_module(f"jobs.commands.{name}").main
    return command(words)


def command_names() -> list[str]:
    """Return the commands' names: those of the files in jobs/commands/."""
    return sorted(path.stem for path in COMMANDS.glob("[!_]*.py"))


def help_text() -> str:
    """Return the text of `fnet --help`, made of the first line of each command: fnet USAGE: TEXT (GROUP NUMBER)."""
    rows = []
    for name in command_names():
        with (COMMANDS / f"{name}.py").open(encoding="utf-8") as file:  # an import would load torch, W&B, matplotlib
            usage, _, rest = file.readline().strip('"\n').partition(": ")
        text, _, place = rest.rpartition(" (")
        rows.append((place, f"  {usage.removeprefix('fnet '):<23} {text}"))
    rows.sort()  # by group and number, "look 2)": the order in which a newcomer meets the commands
    groups = [[group, *(row for place, row in rows if place.startswith(group))] for group in GROUPS]
    return HELP.format("\n".join(line for group in groups for line in group))


if __name__ == "__main__":
    sys.exit(main())
