"""Shared by the commands: parse a command line, load a job file, find the named run and its Slurm jobs."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fnet_dist.checkpoint.resume import old_word_note
from fnet_dist.config.help import settings_help
from fnet_dist.config.load import load_config, settings_class
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError
from fnet_dist.processes import quoted
from fnet_dist.run.attempt import list_attempts, restore_config
from fnet_dist.run.run_dir import RunDir, find_run, read_json
from fnet_dist.run.sharing import other_owner
from slurm import client
from slurm.site_config import Site, read_site
from slurm.types import TERMINAL_STATES, QueuedJob, ShownJob

JOB_ID = r"\d+(_\d+)?"


class Parser(argparse.ArgumentParser):
    """A parser that takes --nproc_per_node for --nproc-per-node, as torchrun does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args([_with_dashes(word) for word in args or ()], namespace)


def _with_dashes(word: str) -> str:
    """Return a flag's name with dashes; a value, and the name of a setting, stay as they are."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", flag) else word


class ParserWithSettings(Parser):
    """A parser whose help also lists all settings, those of the job file's recipe among them."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`; remember them, as the help depends on the job file that they name."""
        self._words = args or ()
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return f"{super().format_help()}\n{settings_help(settings_class(self._words))}\n"


def command_parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return a parser made of a command's module docstring: "fnet NAME WORD ...: TEXT (PLACE)", and more description.

    The words JOBFILE, RUN and [RUN] become arguments. A command with a JOBFILE takes settings, and its help lists them.
    """
    first, _, more = (doc or "").partition("\n")
    usage, _, text = first.partition(": ")
    words, text = usage.split(), f"{text.rpartition(' (')[0]}. {more}"
    parser_class = ParserWithSettings if "JOBFILE" in words else Parser
    parser = parser_class(prog=" ".join(words[:2]), description=text, **options)
    if "JOBFILE" in words:
        parser.usage = f"{usage} [options] [--section.key VALUE ...]"
        parser.allow_abbrev = False  # --opt would be taken for --options, and it may begin a setting's name
        parser.add_argument("jobfile", metavar="JOBFILE", help="a .toml file, or a run's config.json")
    elif {"RUN", "[RUN]"} & {*words}:
        optional, about = "[RUN]" in words, "name, directory or Slurm job id"
        if optional:
            about += "; left out, " + ("all runs" if words[1] == "status" else "the newest")
        parser.add_argument("run", nargs="?" if optional else None, metavar="RUN", help=about)
    return parser


def chosen_numbers(text: str, kind: str) -> tuple[int, ...] | None:
    """Return the ranks or nodes that `--rank TEXT` or `--node TEXT` names, in order; None for all."""
    if text == "all":
        return None
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(f"--{kind} {text!r}: expected a {kind}, several as in 0,3, or all")
    return tuple(sorted({*map(int, numbers)}))


def check_control(run: RunDir, site: Site) -> None:
    """Raise ConfigError if another user made `run`, and the site lets only that user stop, cancel, ask and resume."""
    if (owner := other_owner(run)) is not None and site.control != "group":
        raise ConfigError(
            f"{run.path} belongs to {owner}, and only {owner} may stop, cancel, ask or resume it; use another "
            '--run.name (control = "group" in site.toml lets the group do all that)'
        )


def load_job(jobfile: str, overrides: Sequence[str], site: Site) -> Config:
    """Load a job file: command line over environment over job file over site.toml over defaults."""
    below = {"run.root": site.run_root, "run.mode": site.run_mode, "data.root": site.data_root}
    given = {name: text for name, text in below.items() if text is not None}
    run = RunDir(Path(jobfile).parent)
    if run.config == Path(jobfile):
        restore_config(run)
    config = load_config(["--config", jobfile, *overrides], below=given)
    if (note := old_word_note(config)) is not None:
        print(note, file=sys.stderr)
    return config


def with_defaults(overrides: Sequence[str], defaults: Mapping[str, str]) -> list[str]:
    """Return `overrides` and those `defaults` ({"--section.key": value}) that are not among them."""
    given = {word.partition("=")[0].replace("_", "-") for word in overrides}
    return [*overrides, *(word for name, value in defaults.items() if name not in given for word in (name, value))]


def run_root() -> Path:
    """Return the directory of the runs: `run_root` of site.toml, else `runs` in the current directory."""
    return Path(read_site().run_root or "runs").expanduser()


def find_run_or_job(text: str | None, root: Path | None = None) -> RunDir:
    """Return the run with a name, directory or Slurm job id, or the newest if `text` is None. Raises ConfigError if
    there is none, or for the id of a job that has several."""
    root = run_root() if root is None else root
    if text is not None and re.fullmatch(JOB_ID, text) and not RunDir(root / text).config.exists():
        runs = runs_of_job(text, root)
        if len(runs) > 1:
            raise ConfigError(f"job {text} is of {len(runs)} runs: {', '.join(runs)}; name one of them")
        for name in runs:
            return RunDir((root / name).resolve())
        where = root.absolute()
        raise ConfigError(f"no run in {where} was trained in Slurm job {text}; name a run elsewhere by its directory")
    return find_run(text, root)


def runs_of_job(job_id: str, root: Path) -> dict[str, str]:
    """Return {name: job id} of the runs in `root` that are in Slurm job `job_id`, also in any task of that array.

    A sweep has several in an array, and with --pack in a task.
    """
    # No index of jobs: run directories can be moved and removed. What cannot be read is another user's, or no run.
    runs = [run for run in map(RunDir, sorted(root.glob("*"))) if os.access(run.config, os.R_OK)]
    found = ((run.name, each) for run in runs for each in job_ids(run))
    return {name: each for name, each in found if each == job_id or each.startswith(f"{job_id}_")}


def display_name(run: RunDir) -> str:
    """Return what to type for `run`: its name where commands look for runs, else its directory."""
    return run.name if run.path.absolute().parent == run_root().absolute() else quoted(run.path)


def job_ids(run: RunDir) -> list[str]:
    """Return the ids of the Slurm jobs of `run`, past and submitted, the newest first."""
    submitted = read_json(run.job) or {"cluster": None}
    sent = [submitted["id"]] if submitted["cluster"] == "slurm" else []
    begun = [attempt.read_begin()["slurm_job_id"] for attempt in reversed(list_attempts(run))]
    return [*dict.fromkeys(text for text in (*sent, *begun) if text is not None)]


def queued_jobs(run: RunDir) -> list[QueuedJob | ShownJob]:
    """Return the Slurm jobs of `run` that are queued or running. Raises SlurmError if Slurm does not answer."""
    if not (ids := job_ids(run)):
        return []
    listed: list[QueuedJob | ShownJob] = [job for job in client.queue() if job.job_id in ids]
    if listed or (newest := client.show_job(ids[0])) is None or newest.state in TERMINAL_STATES:
        return listed
    return [newest]  # squeue does not list it, but Slurm knows it by its id: a list may be filtered
