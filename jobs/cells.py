"""The cells of a sweep: its runs, found by the sweep's name or job id, and named by the settings that differ."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fnet_dist.run.run_dir import SWEEPS, RunDir, read_json
from jobs.runs import find_run_or_job, run_root, runs_of_job
from jobs.text import NONE

# Names and paths differ between all runs; the data set has a column of its own.
NOT_COMPARED = {"run.name", "run.root", "data.dataset", "data.root", "tracking.name"}


def find_runs(text: str | None, root: Path | None = None) -> list[RunDir]:
    """Return the runs of a sweep by its name, directory or job id; of any other `text`, the run of find_run_or_job."""
    root = run_root() if root is None else root
    if text is not None and len(names := runs_of_job(text, root)) > 1:
        return _in_order([RunDir(root / name) for name in names])
    for home in () if text is None else (root / SWEEPS / text, Path(text)):
        if home.parent.name == SWEEPS and home.is_dir():
            runs = map(RunDir, home.parent.parent.glob("*"))
            if cells := [run for run in runs if os.access(run.config, os.R_OK) and group_of(run) == home.name]:
                return _in_order(cells)
    return [find_run_or_job(text, root)]


def group_of(run: RunDir) -> Any:
    """Return the run's `tracking.group`, the name of its sweep; None if it has none."""
    return ((read_json(run.config) or {}).get("tracking") or {}).get("group")


def read_sweep(cell: RunDir) -> dict[str, Any]:
    """Return what `fnet sweep` wrote of a cell's sweep: command, seed and {run name: settings}; {} if nothing."""
    return read_json(RunDir(cell.path.parent / SWEEPS / str(group_of(cell))).sweep) or {}


def _in_order(cells: Sequence[RunDir]) -> list[RunDir]:
    """Return the cells in the order in which `fnet sweep` lists them, and others by the number of their task."""
    listed = [*read_sweep(cells[0]).get("runs", {})]

    def place(run: RunDir) -> tuple[int, list[int], str]:
        task = (read_json(run.job) or {}).get("id", "")
        numbers = [int(number) for number in task.split("_") if number.isdigit()]
        return (listed.index(run.name) if run.name in listed else len(listed)), numbers, run.name

    return sorted(cells, key=place)


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return {"section.key": its value in each of `configs`} for the settings that are not the same in all."""
    flat = [
        {"recipe": str(config.get("recipe", NONE))}
        | {
            f"{section}.{key}": setting_text(value)
            for section, keys in config.items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        for config in configs
    ]
    names = dict.fromkeys(name for config in flat for name in config if name not in NOT_COMPARED)
    columns = {name: [config.get(name, NONE) for config in flat] for name in names}
    return {name: column for name, column in columns.items() if len({*column}) > 1}


def cell_labels(configs: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return "lr 0.001, seed 1" for each of the runs with `configs`; None unless they are of one sweep.

    Where two settings have the same last word, those have their sections, "optim.name sgd, loss.name nll".
    """
    groups = {(config.get("tracking") or {}).get("group") for config in configs}
    if len(configs) < 2 or len(groups) > 1 or None in groups or not (differing := differing_settings(configs)):
        return None
    words = [name.rpartition(".")[2] for name in differing]
    shown = [word if words.count(word) == 1 else name for word, name in zip(words, differing, strict=True)]
    rows = zip(*differing.values(), strict=True)
    return [", ".join(f"{name} {value}" for name, value in zip(shown, row, strict=True)) for row in rows]


def setting_text(value: object) -> str:
    """Return a setting's value as job files and command lines spell it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
